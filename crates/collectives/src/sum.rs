//! Sums in rank order, the one order all transports use.

/// Adds `from` to `into`, element by element; both have the same length.
pub(crate) fn add(into: &mut [f32], from: &[f32]) {
    assert_eq!(into.len(), from.len(), "summands of one operation have one length");
    for (a, b) in into.iter_mut().zip(from) {
        *a += *b;
    }
}

/// Sums in rank order where `own` holds rank `rank`'s summand and becomes the result, and `others` holds the other
/// ranks' summands one after the other, in rank order: `((x0 + x1) + x2) + …`.
///
/// `others` is used as scratch: the sum of the ranks before this one is built up in its first part.
pub(crate) fn around(own: &mut [f32], others: &mut [f32], rank: usize) {
    let len = own.len();
    if len == 0 {
        return;
    }
    let (before, after) = others.split_at_mut(rank * len);
    if let Some((first, rest)) = before.split_at_mut_checked(len) {
        for summand in rest.chunks_exact(len) {
            add(first, summand);
        }
        // Addition of two numbers is commutative, so `own + first` has the same bits as `first + own`.
        add(own, first);
    }
    for summand in after.chunks_exact(len) {
        add(own, summand);
    }
}
