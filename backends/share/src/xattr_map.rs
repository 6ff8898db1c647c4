//! Names of extended attributes that are others on the host, by rules that the
//! operator gives. The syntax and what it means are virtiofsd's `--xattrmap`, so
//! that a map can be taken along.
//!
//! A rule is `:type:scope:key:prepend:`, with any separator that it begins with;
//! the first that matches decides. A name that the guest gives matches a rule of
//! scope `client` or `all` if it begins with the key, one that the host lists a
//! rule of scope `server` or `all` if it begins with what is prepended. What
//! matches none is as if it were `bad`.

use std::borrow::Cow;
use std::ffi::{CStr, CString};

use rustix::io::Errno;
use thiserror::Error;

/// Why a text is no map.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum XattrMapError {
    /// No rule at all.
    #[error("there is no rule")]
    Empty,
    /// A field without its end.
    #[error("rule {0} has too few fields: it is :type:scope:key:prepend: or :map:key:prepend:")]
    Unfinished(usize),
    /// A rule of no kind.
    #[error("rule {0} has the type {1:?}: use prefix, ok, bad, unsupported or map")]
    Type(usize, String),
    /// A rule for nobody.
    #[error("rule {0} has the scope {1:?}: use client, server or all")]
    Scope(usize, String),
    /// Rules after the one that ends them.
    #[error("rule {0} comes after a map rule, which is to be the last")]
    AfterMap(usize),
    /// `map` that maps to the same.
    #[error("rule {0} prepends nothing: say what")]
    NothingPrepended(usize),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Prefix,
    Ok,
    Bad,
    Unsupported,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Scope {
    Client,
    Server,
    All,
}

#[derive(Debug, Clone, PartialEq, Eq)]
struct Rule {
    kind: Kind,
    scope: Scope,
    key: String,
    prepend: String,
}

/// Rules, in order.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct XattrMap(Vec<Rule>);

/// What is left of the text of a map.
struct Text<'a> {
    rest: &'a str,
    separator: char,
    number: usize,
}

impl<'a> Text<'a> {
    /// The next rule, if there is one.
    fn next_rule(&mut self) -> bool {
        self.rest = self.rest.trim_start();
        let mut letters = self.rest.chars();
        let Some(separator) = letters.next() else {
            return false;
        };
        (self.separator, self.rest) = (separator, letters.as_str());
        self.number += 1;
        true
    }

    fn field(&mut self) -> Result<&'a str, XattrMapError> {
        let (field, rest) = self
            .rest
            .split_once(self.separator)
            .ok_or(XattrMapError::Unfinished(self.number))?;
        self.rest = rest;
        Ok(field)
    }
}

fn rule(kind: Kind, scope: Scope, key: &str, prepend: &str) -> Rule {
    Rule {
        kind,
        scope,
        key: key.to_owned(),
        prepend: prepend.to_owned(),
    }
}

impl XattrMap {
    /// Reads rules.
    ///
    /// # Errors
    /// [`XattrMapError`] for the first that is none.
    pub fn parse(text: &str) -> Result<Self, XattrMapError> {
        let mut rules = Vec::new();
        let mut text = Text {
            rest: text,
            separator: ':',
            number: 0,
        };
        let mut ended = false;
        while text.next_rule() {
            if ended {
                return Err(XattrMapError::AfterMap(text.number));
            }
            let kind = match text.field()? {
                "prefix" => Kind::Prefix,
                "ok" => Kind::Ok,
                "bad" => Kind::Bad,
                "unsupported" => Kind::Unsupported,
                "map" => {
                    let (key, prepend) = (text.field()?, text.field()?);
                    if prepend.is_empty() {
                        return Err(XattrMapError::NothingPrepended(text.number));
                    }
                    rules.extend(simple(key, prepend));
                    ended = true;
                    continue;
                }
                other => return Err(XattrMapError::Type(text.number, other.to_owned())),
            };
            let scope = match text.field()? {
                "client" => Scope::Client,
                "server" => Scope::Server,
                "all" => Scope::All,
                other => return Err(XattrMapError::Scope(text.number, other.to_owned())),
            };
            let (key, prepend) = (text.field()?, text.field()?);
            rules.push(rule(kind, scope, key, prepend));
        }
        if rules.is_empty() {
            return Err(XattrMapError::Empty);
        }
        Ok(Self(rules))
    }

    /// What a name of the guest's is on the host.
    ///
    /// # Errors
    /// EPERM for a name that is bad, ENOTSUP for one that is not supported.
    pub(crate) fn to_host<'a>(&self, name: &'a CStr) -> Result<Cow<'a, CStr>, Errno> {
        let bytes = name.to_bytes();
        let matching = self
            .0
            .iter()
            .find(|rule| rule.scope != Scope::Server && bytes.starts_with(rule.key.as_bytes()));
        match matching.map(|rule| (rule.kind, &rule.prepend)) {
            Some((Kind::Ok, _)) => Ok(Cow::Borrowed(name)),
            Some((Kind::Prefix, prepend)) => {
                let whole = [prepend.as_bytes(), bytes].concat();
                CString::new(whole)
                    .map(Cow::Owned)
                    .map_err(|_| Errno::INVAL)
            }
            Some((Kind::Unsupported, _)) => Err(Errno::OPNOTSUPP),
            Some((Kind::Bad, _)) | None => Err(Errno::PERM),
        }
    }

    /// What a name that the host lists is in the guest, if the guest is to see it.
    pub(crate) fn to_guest<'a>(&self, name: &'a CStr) -> Option<&'a CStr> {
        let bytes = name.to_bytes_with_nul();
        let matching = self.0.iter().find(|rule| {
            let prepend = rule.prepend.as_bytes();
            rule.scope != Scope::Client && name.to_bytes().starts_with(prepend)
        })?;
        let shown = match matching.kind {
            Kind::Ok => bytes,
            Kind::Prefix => &bytes[matching.prepend.len()..],
            Kind::Bad | Kind::Unsupported => return None,
        };
        // Nothing is no name.
        let shown = CStr::from_bytes_with_nul(shown).ok()?;
        (!shown.is_empty()).then_some(shown)
    }
}

/// What `map` stands for: the names that begin with the key (all, without one)
/// are prefixed; what is stored like that cannot be reached in another way, and
/// what has the key on the host is not shown.
fn simple(key: &str, prepend: &str) -> Vec<Rule> {
    let prefixed = rule(Kind::Prefix, Scope::All, key, prepend);
    if key.is_empty() {
        return vec![prefixed, rule(Kind::Bad, Scope::All, "", "")];
    }
    vec![
        prefixed,
        rule(Kind::Bad, Scope::Server, "", key),
        rule(Kind::Bad, Scope::Client, prepend, ""),
        rule(Kind::Ok, Scope::All, "", ""),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;

    fn map(text: &str) -> XattrMap {
        XattrMap::parse(text).unwrap()
    }

    fn host(map: &XattrMap, name: &CStr) -> Result<CString, Errno> {
        map.to_host(name).map(Cow::into_owned)
    }

    #[test]
    fn everything_may_have_a_prefix() {
        for text in [
            ":prefix:all::user.virtiofs.::bad:all:::",
            ":map::user.virtiofs.:",
            "  /prefix/all//user.virtiofs./\n  |bad|all|||\n",
        ] {
            let map = map(text);
            assert_eq!(
                host(&map, c"security.x").as_deref(),
                Ok(c"user.virtiofs.security.x")
            );
            assert_eq!(
                host(&map, c"user.virtiofs.x").as_deref(),
                Ok(c"user.virtiofs.user.virtiofs.x"),
                "no way around"
            );
            assert_eq!(map.to_guest(c"user.virtiofs.trusted.y"), Some(c"trusted.y"));
            assert_eq!(map.to_guest(c"security.selinux"), None);
            assert_eq!(map.to_guest(c"user.virtiofs."), None);
        }
    }

    #[test]
    fn a_part_may_have_one_and_is_hidden_otherwise() {
        for text in [
            "/prefix/all/trusted./user.virtiofs./ /bad/server//trusted./ \
             /bad/client/user.virtiofs.// /ok/all///",
            "/map/trusted./user.virtiofs./",
        ] {
            let map = map(text);
            assert_eq!(
                host(&map, c"trusted.a").as_deref(),
                Ok(c"user.virtiofs.trusted.a")
            );
            assert_eq!(host(&map, c"user.virtiofs.trusted.a"), Err(Errno::PERM));
            assert_eq!(host(&map, c"user.a").as_deref(), Ok(c"user.a"));
            assert_eq!(map.to_guest(c"trusted.a"), None);
            assert_eq!(map.to_guest(c"user.virtiofs.trusted.a"), Some(c"trusted.a"));
            assert_eq!(map.to_guest(c"user.a"), Some(c"user.a"));
        }
    }

    #[test]
    fn the_first_rule_that_matches_decides_and_none_is_bad() {
        let map = map(":unsupported:all:security.selinux:security.selinux::ok:client:security.::");
        assert_eq!(host(&map, c"security.selinux"), Err(Errno::OPNOTSUPP));
        assert_eq!(host(&map, c"security.a").as_deref(), Ok(c"security.a"));
        assert_eq!(host(&map, c"user.a"), Err(Errno::PERM));
        assert_eq!(map.to_guest(c"security.a"), None, "for the client alone");
    }

    #[test]
    fn what_is_no_map_is_refused() {
        let wrong = |text| XattrMap::parse(text).unwrap_err();
        assert_eq!(wrong(""), XattrMapError::Empty);
        assert_eq!(wrong(" \n"), XattrMapError::Empty);
        for text in [
            ":",
            ":ok",
            ":ok:",
            ":ok:all:",
            ":ok:all::",
            ":map:a:b",
            "::",
        ] {
            let error = wrong(text);
            let expected = [
                XattrMapError::Unfinished(1),
                XattrMapError::Type(1, String::new()),
            ];
            assert!(expected.contains(&error), "{text}: {error}");
        }
        let typed = wrong(":ok:all::: :okay:all:::");
        assert_eq!(typed, XattrMapError::Type(2, "okay".to_owned()));
        let scoped = wrong(":ok:both:::");
        assert_eq!(scoped, XattrMapError::Scope(1, "both".to_owned()));
        let after = wrong(":map::user.a.: :ok:all:::");
        assert_eq!(after, XattrMapError::AfterMap(2));
        assert_eq!(wrong(":map:a::"), XattrMapError::NothingPrepended(1));
    }
}
