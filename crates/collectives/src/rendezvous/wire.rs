//! The messages of the rendezvous: `magic u32, version u16, kind u16, length u32`, then the body. All numbers are
//! little endian. The prefix, the rank at the start of a hello and the refusal keep their layout in every version, so
//! two versions can tell each other that they differ.

use std::net::SocketAddr;

/// Version of the rendezvous and of the frames between ranks; both ends must have the same.
///
/// 1: the first.
pub const PROTOCOL_VERSION: u16 = 1;

/// "COHO": a connection that does not start with it is not one of ours.
const MAGIC: u32 = 0x4f48_4f43;
pub(super) const PREFIX_BYTES: usize = 12;
/// Most bytes of a body: the addresses of the largest group with room to spare.
pub(super) const BODY_BYTES_MAX: usize = 32 << 10;
/// Most bytes of a text. Plans above it are refused before they are sent; reasons are cut.
pub(super) const TEXT_BYTES_MAX: usize = 1 << 10;

/// What only members of one group know, so strays and members of other groups cannot join its mesh.
pub(super) type Token = [u8; 16];

/// What a connection of the mesh is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Purpose {
    Data,
    Control,
    Plan,
}

/// A joining rank's claim.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Hello {
    pub(super) rank: u32,
    pub(super) size: u32,
    pub(super) config_hash: [u8; 32],
    pub(super) plan: String,
    pub(super) mesh: SocketAddr,
}

/// Why rank 0 sends a rank away. Values are texts, so their layout does not change with versions.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Refusal {
    /// Code 1 to 4: version, size, plan, config hash; rank 0's value and the joiner's.
    Differs {
        field: u8,
        leader: String,
        joiner: String,
    },
    Duplicate {
        rank: u32,
    },
    OutOfRange {
        rank: u32,
        size: u32,
    },
    GaveUp {
        reason: String,
    },
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Message {
    Hello(Hello),
    /// The group is complete: its token and the mesh addresses of ranks 1, 2, ….
    Welcome {
        token: Token,
        addresses: Vec<SocketAddr>,
    },
    Refused(Refusal),
    /// The first message of a mesh connection.
    Connect {
        token: Token,
        rank: u32,
        purpose: Purpose,
    },
}

/// What could be read of a message.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Decoded {
    Message(Message),
    /// A hello of another protocol version; nothing but its rank is known to be readable.
    OtherVersion {
        rank: u32,
        version: u16,
    },
}

/// The length of the body, or what is wrong with the prefix.
pub(super) fn body_length(prefix: &[u8; PREFIX_BYTES]) -> Result<usize, &'static str> {
    let mut reader = Reader(prefix);
    if reader.u32() != Some(MAGIC) {
        return Err("it does not speak this protocol");
    }
    let len = reader.skip(4).and_then(Reader::u32).map_or(usize::MAX, |len| len as usize);
    if len > BODY_BYTES_MAX {
        return Err("its message is too long");
    }
    Ok(len)
}

pub(super) fn encode(message: &Message) -> Vec<u8> {
    let mut body = Writer(Vec::new());
    let kind = match message {
        Message::Hello(hello) => {
            body.u32(hello.rank);
            body.u32(hello.size);
            body.0.extend_from_slice(&hello.config_hash);
            body.text(&hello.plan);
            body.text(&hello.mesh.to_string());
            0
        }
        Message::Welcome { token, addresses } => {
            body.0.extend_from_slice(token);
            body.u32(addresses.len() as u32);
            for address in addresses {
                body.text(&address.to_string());
            }
            1
        }
        Message::Refused(refusal) => {
            body.refusal(refusal);
            2
        }
        Message::Connect { token, rank, purpose } => {
            body.0.extend_from_slice(token);
            body.u32(*rank);
            body.0.push(*purpose as u8);
            3
        }
    };
    let mut bytes = Writer(Vec::with_capacity(PREFIX_BYTES + body.0.len()));
    bytes.u32(MAGIC);
    bytes.0.extend_from_slice(&PROTOCOL_VERSION.to_le_bytes());
    bytes.0.extend_from_slice(&u16::to_le_bytes(kind));
    bytes.u32(body.0.len() as u32);
    bytes.0.extend_from_slice(&body.0);
    bytes.0
}

/// Reads one whole message (prefix and body); `None` when it is malformed.
pub(super) fn decode(bytes: &[u8]) -> Option<Decoded> {
    let mut reader = Reader(bytes);
    reader.skip(4)?;
    let version = reader.u16()?;
    let kind = reader.u16()?;
    reader.skip(4)?;
    if version != PROTOCOL_VERSION && kind == 0 {
        return Some(Decoded::OtherVersion { rank: reader.u32()?, version });
    }
    let message = match kind {
        0 => Message::Hello(Hello {
            rank: reader.u32()?,
            size: reader.u32()?,
            config_hash: reader.array()?,
            plan: reader.text()?,
            mesh: reader.text()?.parse().ok()?,
        }),
        1 => {
            let token = reader.array()?;
            let count = reader.u32()?;
            let addresses = (0..count).map(|_| reader.text()?.parse().ok()).collect::<Option<Vec<_>>>()?;
            Message::Welcome { token, addresses }
        }
        2 => Message::Refused(reader.refusal()?),
        3 => Message::Connect {
            token: reader.array()?,
            rank: reader.u32()?,
            purpose: match reader.u8()? {
                0 => Purpose::Data,
                1 => Purpose::Control,
                2 => Purpose::Plan,
                _ => return None,
            },
        },
        _ => return None,
    };
    reader.0.is_empty().then_some(Decoded::Message(message))
}

struct Writer(Vec<u8>);

impl Writer {
    fn u32(&mut self, value: u32) {
        self.0.extend_from_slice(&value.to_le_bytes());
    }

    fn text(&mut self, text: &str) {
        let ends = text.char_indices().map(|(start, char)| start + char.len_utf8());
        let cut = ends.take_while(|end| *end <= TEXT_BYTES_MAX).last().unwrap_or(0);
        self.u32(cut as u32);
        self.0.extend_from_slice(&text.as_bytes()[..cut]);
    }

    fn refusal(&mut self, refusal: &Refusal) {
        match refusal {
            Refusal::Differs { field, leader, joiner } => {
                self.0.push(*field);
                self.text(leader);
                self.text(joiner);
            }
            Refusal::Duplicate { rank } => {
                self.0.push(5);
                self.u32(*rank);
            }
            Refusal::OutOfRange { rank, size } => {
                self.0.push(6);
                self.u32(*rank);
                self.u32(*size);
            }
            Refusal::GaveUp { reason } => {
                self.0.push(7);
                self.text(reason);
            }
        }
    }
}

struct Reader<'a>(&'a [u8]);

impl<'a> Reader<'a> {
    fn take(&mut self, count: usize) -> Option<&'a [u8]> {
        let (taken, rest) = self.0.split_at_checked(count)?;
        self.0 = rest;
        Some(taken)
    }

    fn skip(&mut self, count: usize) -> Option<&mut Self> {
        self.take(count)?;
        Some(self)
    }

    fn array<const N: usize>(&mut self) -> Option<[u8; N]> {
        self.take(N)?.try_into().ok()
    }

    fn u8(&mut self) -> Option<u8> {
        self.array::<1>().map(|[byte]| byte)
    }

    fn u16(&mut self) -> Option<u16> {
        self.array().map(u16::from_le_bytes)
    }

    fn u32(&mut self) -> Option<u32> {
        self.array().map(u32::from_le_bytes)
    }

    fn text(&mut self) -> Option<String> {
        let len = self.u32()? as usize;
        String::from_utf8(self.take(len)?.to_vec()).ok()
    }

    fn refusal(&mut self) -> Option<Refusal> {
        Some(match self.u8()? {
            field @ 1..=4 => Refusal::Differs { field, leader: self.text()?, joiner: self.text()? },
            5 => Refusal::Duplicate { rank: self.u32()? },
            6 => Refusal::OutOfRange { rank: self.u32()?, size: self.u32()? },
            7 => Refusal::GaveUp { reason: self.text()? },
            _ => return None,
        })
    }
}
