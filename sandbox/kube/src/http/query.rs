//! What follows the question mark, and percent signs.

use crate::failure::Failure;

/// The parameters of a request, in their order.
#[derive(Debug, Default)]
pub(crate) struct Query(Vec<(String, String)>);

impl Query {
    pub(crate) fn parse(text: &str) -> Result<Self, Failure> {
        let mut all = Vec::new();
        for part in text.split('&').filter(|part| !part.is_empty()) {
            let (name, value) = part.split_once('=').unwrap_or((part, ""));
            // A plus sign is a space here, and not in paths.
            let name = decode(&name.replace('+', " "))?;
            let value = decode(&value.replace('+', " "))?;
            all.push((name, value));
        }
        Ok(Self(all))
    }

    /// The same with this value of a parameter that says nothing.
    pub(crate) fn with_usual(mut self, name: &str, value: Option<&str>) -> Self {
        if let Some(value) = value.filter(|_| self.get(name).is_none()) {
            self.0.push((name.to_owned(), value.to_owned()));
        }
        self
    }

    /// The first value of that name that says something.
    pub(crate) fn get(&self, name: &str) -> Option<&str> {
        self.all(name).into_iter().find(|value| !value.is_empty())
    }

    /// All values of that name.
    pub(crate) fn all(&self, name: &str) -> Vec<&str> {
        let of = self.0.iter().filter(|(known, _)| known == name);
        of.map(|(_, value)| value.as_str()).collect()
    }

    /// As Go reads it.
    pub(crate) fn flag(&self, name: &str) -> Result<bool, Failure> {
        match self.get(name) {
            None => Ok(false),
            Some("1" | "t" | "T" | "true" | "TRUE" | "True") => Ok(true),
            Some("0" | "f" | "F" | "false" | "FALSE" | "False") => Ok(false),
            Some(_) => Err(Failure::bad_request(format!(
                "{name}: is neither true nor false"
            ))),
        }
    }

    /// A whole number that is not negative.
    pub(crate) fn number(&self, name: &str) -> Result<Option<u64>, Failure> {
        let parse = |text: &str| {
            let number: Result<u64, _> = text.parse();
            number.map_err(|_| Failure::bad_request(format!("{name}: is no whole number")))
        };
        self.get(name).map(parse).transpose()
    }
}

/// Text with its percent signs resolved.
pub(crate) fn decode(text: &str) -> Result<String, Failure> {
    let bad = || Failure::bad_request("the address is not well formed");
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let Some((&byte, tail)) = rest.split_first() {
        if byte != b'%' {
            bytes.push(byte);
            rest = tail;
            continue;
        }
        let hex = tail
            .get(..2)
            .filter(|hex| hex.iter().all(u8::is_ascii_hexdigit));
        let hex = hex
            .and_then(|hex| str::from_utf8(hex).ok())
            .ok_or_else(bad)?;
        bytes.push(u8::from_str_radix(hex, 16).map_err(|_| bad())?);
        rest = &tail[2..];
    }
    String::from_utf8(bytes).map_err(|_| bad())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parameters_are_read() {
        let query = Query::parse("a=1&b=x%2Cy+z&command=ls&command=-l&c&t=true").unwrap();
        assert_eq!(query.number("a").unwrap(), Some(1));
        assert_eq!(query.get("b"), Some("x,y z"));
        assert_eq!(query.all("command"), ["ls", "-l"]);
        assert_eq!(query.get("c"), None);
        let query = query.with_usual("c", Some("usual"));
        let query = query.with_usual("a", Some("2")).with_usual("d", None);
        assert_eq!((query.get("c"), query.get("a")), (Some("usual"), Some("1")));
        assert_eq!(query.get("d"), None);
        assert!(query.flag("t").unwrap() && !query.flag("d").unwrap());
        assert!(query.flag("b").is_err() && query.number("b").is_err());
        for bad in ["a=%", "a=%4", "a=%zz", "a=%ff", "%+1=1"] {
            assert!(Query::parse(bad).is_err(), "{bad}");
        }
    }
}
