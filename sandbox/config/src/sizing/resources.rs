//! What a shim is told of a pod's resources: four annotations that containerd sets.
//!
//! They are on the pod's sandbox container only, and come from the kubelet (1.23 or later), which has
//! added up the containers: `SandboxCPUQuota` and the like in containerd's `pkg/cri/annotations`. Where
//! nothing was said of a resource the annotation is missing, or 0.

use crate::problem::Violation;

/// Microseconds of CPU time per period, the sum of the limits; 0 or -1 if there is none.
pub const CPU_QUOTA: &str = "io.kubernetes.cri.sandbox-cpu-quota";
/// Microseconds of a period.
pub const CPU_PERIOD: &str = "io.kubernetes.cri.sandbox-cpu-period";
/// 1024 for each CPU requested; 2, the least there can be, if none is.
pub const CPU_SHARES: &str = "io.kubernetes.cri.sandbox-cpu-shares";
/// Bytes, the sum of the memory limits; 0 or -1 if there is none.
pub const MEMORY: &str = "io.kubernetes.cri.sandbox-memory";

/// What the kernel takes where no period is given.
const DEFAULT_PERIOD: u64 = 100_000;
/// Shares of a CPU.
const SHARES: u128 = 1024;
/// What the kubelet writes for a pod that requests nothing.
const NO_SHARES: u64 = 2;

/// The sums over a pod's containers.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Resources {
    /// Limit in thousandths of a CPU, rounded up.
    pub milli_cpus: Option<u64>,
    /// Request in thousandths of a CPU, rounded up, as far as shares tell it: where a pod has a
    /// CPU limit and no request, the kubelet takes one for the other.
    pub milli_cpus_requested: Option<u64>,
    /// Memory limit in bytes.
    pub memory: Option<u64>,
}

impl Resources {
    /// Finds them among a sandbox container's annotations.
    ///
    /// # Errors
    ///
    /// Every value that is no number, is negative other than -1, or could not be the kernel's.
    pub fn read<'a>(
        annotations: impl IntoIterator<Item = (&'a str, &'a str)>,
    ) -> Result<Self, Vec<Violation>> {
        let mut violations = Vec::new();
        let (mut quota, mut period, mut shares, mut memory) = (None, None, None, None);
        for (key, text) in annotations {
            let value = match key {
                CPU_QUOTA => &mut quota,
                CPU_PERIOD => &mut period,
                CPU_SHARES => &mut shares,
                MEMORY => &mut memory,
                _ => continue,
            };
            match amount(text) {
                Ok(amount) => *value = amount,
                Err(rule) => violations.push(Violation::Value {
                    place: None,
                    key: key.to_owned(),
                    value: text.to_owned(),
                    rule: rule.into(),
                    cure: "containerd sets it: look for what else does".into(),
                }),
            }
        }
        if !violations.is_empty() {
            return Err(violations);
        }
        let period = u128::from(period.unwrap_or(DEFAULT_PERIOD));
        let milli = |amount: u64, one: u128| {
            let milli = (u128::from(amount) * 1000).div_ceil(one);
            u64::try_from(milli).unwrap_or(u64::MAX)
        };
        Ok(Self {
            milli_cpus: quota.map(|quota| milli(quota, period)),
            milli_cpus_requested: shares
                .filter(|shares| *shares > NO_SHARES)
                .map(|shares| milli(shares, SHARES)),
            memory,
        })
    }
}

/// A number as the CRI has it: signed, with 0 and -1 for nothing said.
fn amount(text: &str) -> Result<Option<u64>, &'static str> {
    let number: i64 = text
        .parse()
        .map_err(|_| "is not a number of 64 bits with a sign")?;
    match number {
        0 | -1 => Ok(None),
        _ => u64::try_from(number)
            .map(Some)
            .map_err(|_| "is negative, and not the -1 that stands for no limit"),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn read(quota: &str, period: &str, shares: &str, memory: &str) -> Resources {
        let all = [
            (CPU_QUOTA, quota),
            (CPU_PERIOD, period),
            (CPU_SHARES, shares),
            (MEMORY, memory),
            ("io.kubernetes.cri.sandbox-id", "x"),
        ];
        Resources::read(all).unwrap()
    }

    #[test]
    fn the_kubelets_numbers_are_read() {
        let resources = |milli_cpus, milli_cpus_requested, memory| Resources {
            milli_cpus,
            milli_cpus_requested,
            memory,
        };
        for (texts, expected) in [
            // Nothing said: kubelet 1.23 and later, with and without a quota of its own.
            (("0", "100000", "2", "0"), resources(None, None, None)),
            (("-1", "100000", "2", "-1"), resources(None, None, None)),
            (("0", "0", "0", "0"), resources(None, None, None)),
            // 500m and 256 MiB, with the request taken from the limit.
            (
                ("50000", "100000", "512", "268435456"),
                resources(Some(500), Some(500), Some(256 << 20)),
            ),
            // A request alone: 100m are 102 shares.
            (
                ("0", "100000", "102", "0"),
                resources(None, Some(100), None),
            ),
            // Another period, and one that is missing.
            (
                ("1500", "1000", "2", "0"),
                resources(Some(1500), None, None),
            ),
            (("150000", "0", "2", "0"), resources(Some(1500), None, None)),
            // A thousandth is never lost.
            (
                ("100001", "100000", "2", "1"),
                resources(Some(1001), None, Some(1)),
            ),
            // As large as can be.
            (
                (
                    "9223372036854775807",
                    "1",
                    "9223372036854775807",
                    "9223372036854775807",
                ),
                resources(
                    Some(u64::MAX),
                    Some(9007199254740992000),
                    Some(i64::MAX as u64),
                ),
            ),
        ] {
            let (quota, period, shares, memory) = texts;
            assert_eq!(read(quota, period, shares, memory), expected, "{texts:?}");
        }
        assert_eq!(Resources::read([]), Ok(Resources::default()));
    }

    #[test]
    fn absurd_numbers_are_all_refused_by_name() {
        let violations = Resources::read([
            (CPU_QUOTA, "-2"),
            (CPU_PERIOD, "-9223372036854775808"),
            (CPU_SHARES, "9223372036854775808"),
            (MEMORY, "512Mi"),
        ])
        .unwrap_err();
        let lines: Vec<String> = violations.iter().map(ToString::to_string).collect();
        let cure = "containerd sets it: look for what else does";
        let sign = "is negative, and not the -1 that stands for no limit";
        let number = "is not a number of 64 bits with a sign";
        assert_eq!(
            lines,
            [
                format!("{CPU_QUOTA} '-2': {sign}; {cure}"),
                format!("{CPU_PERIOD} '-9223372036854775808': {sign}; {cure}"),
                format!("{CPU_SHARES} '9223372036854775808': {number}; {cure}"),
                format!("{MEMORY} '512Mi': {number}; {cure}"),
            ]
        );
        for text in ["", " 1", "1.5", "0x10", "NaN"] {
            assert!(Resources::read([(CPU_QUOTA, text)]).is_err(), "{text}");
        }
    }

    proptest! {
        /// As the kubelet computes both, for every limit it can write.
        #[test]
        fn a_limit_of_the_kubelets_comes_back(milli in 10u64..1_000_000) {
            let quota = (milli * 100_000 / 1000).to_string();
            let shares = (milli * 1024 / 1000).to_string();
            let resources = read(&quota, "100000", &shares, "0");
            prop_assert_eq!(resources.milli_cpus, Some(milli));
            // A share is about a thousandth.
            let requested = resources.milli_cpus_requested.unwrap();
            prop_assert!(requested.abs_diff(milli) <= 1, "{requested}");
        }

        #[test]
        fn no_numbers_panic(all in any::<[i64; 4]>()) {
            let [quota, period, shares, memory] = all.map(|number| number.to_string());
            let all = [
                (CPU_QUOTA, quota.as_str()),
                (CPU_PERIOD, &period),
                (CPU_SHARES, &shares),
                (MEMORY, &memory),
            ];
            let negative = all.iter().any(|(_, text)| text.starts_with('-') && *text != "-1");
            prop_assert_eq!(Resources::read(all).is_err(), negative);
        }
    }
}
