//! Which cards, drivers and compilers go together.

use crate::Error;

/// The oldest compute capability whose instructions the kernels use.
const OLDEST: (i32, i32) = (8, 0);

/// The target for a card: the architecture-specific one where kernels may use it.
pub(crate) fn target((major, minor): (i32, i32)) -> String {
    let specific = if major >= 9 { "a" } else { "" };
    format!("sm_{major}{minor}{specific}")
}

/// Refuses a card that is too old, by its name.
pub(crate) fn card(name: &str, (major, minor): (i32, i32)) -> Result<(), Error> {
    if (major, minor) >= OLDEST {
        return Ok(());
    }
    Err(Error::UnsupportedCard { card: name.to_owned(), major, minor })
}

/// Refuses a target that no supported card has.
pub(crate) fn known(arch: &str) -> Result<(), Error> {
    let digits = arch.strip_prefix("sm_").map(|rest| rest.trim_end_matches('a'));
    let number = digits.filter(|digits| digits.len() >= 2).and_then(|digits| digits.parse::<i32>().ok());
    match number {
        Some(number)
            if (number / 10, number % 10) >= OLDEST && target((number / 10, number % 10)) == arch =>
        {
            Ok(())
        }
        _ => Err(Error::Arch { arch: arch.to_owned() }),
    }
}

/// Refuses a driver that does not load what this compiler makes: `driver` is what `cuDriverGetVersion` says (12080),
/// `nvrtc` the compiler's version. Within a major version, machine code made for the card runs on every driver.
pub(crate) fn driver(driver: i32, nvrtc: (i32, i32)) -> Result<(), Error> {
    let supports = (driver / 1000, driver % 1000 / 10);
    if supports.0 >= nvrtc.0 { Ok(()) } else { Err(Error::DriverTooOld { supports, nvrtc }) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn targets_are_those_of_the_card() {
        assert_eq!([(8, 0), (8, 9), (9, 0), (10, 0)].map(target), ["sm_80", "sm_89", "sm_90a", "sm_100a"]);
        for good in ["sm_80", "sm_86", "sm_90a", "sm_100a", "sm_120a"] {
            assert_eq!(known(good), Ok(()), "{good}");
        }
        for bad in ["sm_75", "sm_90", "90a", "sm_", "sm_9", "compute_90", "sm_80a", ""] {
            let said = known(bad).unwrap_err().to_string();
            assert!(said.contains(&format!("`{bad}`")) && said.contains("sm_90a"), "{said}");
        }
    }

    #[test]
    fn an_old_card_is_refused_with_the_minimum() {
        assert_eq!(card("NVIDIA A100", (8, 0)), Ok(()));
        let said = card("Tesla V100", (7, 0)).unwrap_err().to_string();
        assert!(said.contains("Tesla V100") && said.contains("7.0") && said.contains("8.0"), "{said}");
    }

    #[test]
    fn a_driver_older_than_the_compiler_is_refused_with_both_versions() {
        for good in [(13_000, (13, 0)), (13_000, (13, 2)), (13_020, (12, 8)), (12_080, (12, 9))] {
            assert_eq!(driver(good.0, good.1), Ok(()), "{good:?}");
        }
        let said = driver(12_080, (13, 0)).unwrap_err().to_string();
        assert!(said.contains("12.8") && said.contains("13.0") && said.contains("driver"), "{said}");
    }
}
