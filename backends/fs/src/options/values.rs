//! Values of options that only directories have: tags, what may be kept, ids.

use pericarp_control::command_line::{BadOption, bad};
use pericarp_share::{IdMap, IdRange, XattrMap};

use crate::{Cache, MAX_TAG};

pub(super) fn tag(name: &str, value: &str) -> Result<String, BadOption> {
    let length = value.len();
    if length == 0 || length > MAX_TAG || value.contains('\0') {
        let rule = format!("a tag has 1 to {MAX_TAG} bytes, and this has {length}: choose another");
        return Err(bad(name, format!("{value:?}"), rule));
    }
    Ok(value.to_owned())
}

pub(super) fn cache(name: &str, value: &str) -> Result<Cache, BadOption> {
    match value {
        "never" => Ok(Cache::Never),
        "auto" => Ok(Cache::Auto),
        "always" => Ok(Cache::Always),
        _ => {
            let rule = "unknown cache mode: use never, auto or always";
            Err(bad(name, format!("{value:?}"), rule))
        }
    }
}

/// Rules for names of extended attributes.
pub(super) fn xattr_map(name: &str, value: &str) -> Result<XattrMap, BadOption> {
    let example = "such as :map::user.virtiofs.:";
    XattrMap::parse(value).map_err(|e| {
        bad(
            name,
            format!("{value:?}"),
            format!("{e}: give rules {example}"),
        )
    })
}

/// Whether locks are the host's, too.
pub(super) fn locks(name: &str, value: &str) -> Result<bool, BadOption> {
    match value {
        "host" => Ok(true),
        "guest" => Ok(false),
        _ => {
            let rule = "locks are kept by the guest or by the host: use guest or host";
            Err(bad(name, format!("{value:?}"), rule))
        }
    }
}

/// Ranges such as `:0:100000:65536:`, one after another: first id in the guest,
/// first on the host, how many.
pub(super) fn id_map(name: &str, value: &str) -> Result<IdMap, BadOption> {
    let wrong = |rule: String| bad(name, format!("{value:?}"), rule);
    let numbers = value
        .strip_prefix(':')
        .and_then(|rest| rest.strip_suffix(':'))
        .and_then(|inner| {
            let plain = |text: &str| text.bytes().all(|b| b.is_ascii_digit());
            let id = |text: &str| text.parse::<u32>().ok().filter(|_| plain(text));
            inner.split(':').map(id).collect::<Option<Vec<_>>>()
        })
        .filter(|numbers| numbers.len() % 3 == 0);
    let numbers = numbers.ok_or_else(|| {
        wrong("ranges look like :GUEST:HOST:COUNT:, such as :0:100000:65536:".to_owned())
    })?;
    let ranges = numbers.chunks_exact(3).map(|range| IdRange {
        guest: range[0],
        host: range[1],
        count: range[2],
    });
    IdMap::new(ranges.collect()).map_err(|e| wrong(format!("{e}: correct the ranges")))
}
