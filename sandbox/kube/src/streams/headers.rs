//! The compressed headers of SPDY/3.1 frames that a client sends.
//!
//! They are one zlib stream over all frames of a connection, against a dictionary that the protocol
//! fixes. The inflater has no such thing as a dictionary, but a window of what came before, which
//! begins with it.

use miniz_oxide::inflate::{
    TINFLStatus,
    core::{DecompressorOxide, decompress, inflate_flags::TINFL_FLAG_HAS_MORE_INPUT},
};

/// How far back deflate looks.
const WINDOW: usize = 32 << 10;
/// A larger block of headers is none of a client's that forwards ports.
const LARGEST: usize = 16 << 10;
/// The Adler-32 of the dictionary, by which a stream names it.
const NUMBER: [u8; 4] = [0xe3, 0xc6, 0xa7, 0xc2];

/// The dictionary's first part: words, each after its length in four bytes.
const WORDS: &str = "options head post put delete trace accept accept-charset accept-encoding \
    accept-language accept-ranges age allow authorization cache-control connection content-base \
    content-encoding content-language content-length content-location content-md5 content-range \
    content-type date etag expect expires from host if-match if-modified-since if-none-match \
    if-range if-unmodified-since last-modified location max-forwards pragma proxy-authenticate \
    proxy-authorization range referer retry-after server te trailer transfer-encoding upgrade \
    user-agent vary via warning www-authenticate method get status 200_OK version HTTP/1.1 url \
    public set-cookie keep-alive origin";
/// Its second part.
const REST: &str = "100101201202205206300302303304305306307402405406407408409410411412413414415416\
    417502504505203 Non-Authoritative Information204 No Content301 Moved Permanently400 Bad \
    Request401 Unauthorized403 Forbidden404 Not Found500 Internal Server Error501 Not \
    Implemented503 Service UnavailableJan Feb Mar Apr May Jun Jul Aug Sept Oct Nov Dec 00:00:00 \
    Mon, Tue, Wed, Thu, Fri, Sat, Sun, GMTchunked,text/html,image/png,image/jpg,image/gif,\
    application/xml,application/xhtml+xml,text/plain,text/javascript,publicprivatemax-age=\
    gzip,deflate,sdchcharset=utf-8charset=iso-8859-1,utf-,*,enq=0.";

fn dictionary() -> Vec<u8> {
    let mut all = Vec::with_capacity(1423);
    for word in WORDS.split(' ') {
        let word = word.replace('_', " ");
        all.extend((word.len() as u32).to_be_bytes());
        all.extend(word.bytes());
    }
    all.extend(REST.bytes());
    all
}

/// Reads the headers of one connection.
pub(super) struct Headers {
    state: Box<DecompressorOxide>,
    window: Vec<u8>,
    /// Where the next byte goes.
    at: usize,
    begun: bool,
}

impl Headers {
    pub(super) fn new() -> Self {
        let mut window = dictionary();
        let at = window.len();
        window.resize(WINDOW, 0);
        Self {
            state: Box::default(),
            window,
            at,
            begun: false,
        }
    }

    /// The names and values of the next block.
    pub(super) fn read(&mut self, block: &[u8]) -> Result<Vec<(String, String)>, &'static str> {
        const ODD: &str = "headers that are not compressed as SPDY/3.1 has it";
        let mut input = block;
        if !self.begun {
            // RFC 1950: deflate, and a dictionary.
            let [0x78, flags, a, b, c, d, rest @ ..] = block else {
                return Err(ODD);
            };
            if flags & 0x20 == 0 || [*a, *b, *c, *d] != NUMBER {
                return Err(ODD);
            }
            self.begun = true;
            input = rest;
        }
        let mut plain = Vec::new();
        loop {
            let (status, read, written) = decompress(
                &mut self.state,
                input,
                &mut self.window,
                self.at,
                TINFL_FLAG_HAS_MORE_INPUT,
            );
            let end = self.at + written;
            plain.extend_from_slice(self.window.get(self.at..end).ok_or(ODD)?);
            self.at = end % WINDOW;
            input = input.get(read..).ok_or(ODD)?;
            if plain.len() > LARGEST {
                return Err("headers that are too large");
            }
            match status {
                TINFLStatus::HasMoreOutput => {}
                TINFLStatus::NeedsMoreInput if input.is_empty() => break,
                _ => return Err(ODD),
            }
        }
        parse(&plain).ok_or("headers that are not well formed")
    }
}

fn parse(mut bytes: &[u8]) -> Option<Vec<(String, String)>> {
    let count = number(&mut bytes)?;
    let mut all = Vec::new();
    // Each takes eight bytes at least, of which there are few.
    for _ in 0..count {
        let name = text(&mut bytes)?;
        all.push((name, text(&mut bytes)?));
    }
    Some(all)
}

fn number(bytes: &mut &[u8]) -> Option<u32> {
    let (first, rest) = bytes.split_first_chunk()?;
    *bytes = rest;
    Some(u32::from_be_bytes(*first))
}

fn text(bytes: &mut &[u8]) -> Option<String> {
    let length = number(bytes)? as usize;
    let (text, rest) = bytes.split_at_checked(length)?;
    *bytes = rest;
    String::from_utf8(text.to_vec()).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Made by zlib at its best: port 8080, request 0, error and then data.
    const FIRST: [u8; 51] = [
        0x78, 0xf9, 0xe3, 0xc6, 0xa7, 0xc2, 0x02, 0x25, 0x3a, 0x48, 0xf9, 0x5b, 0x04, 0x4e, 0xea,
        0x16, 0x06, 0x16, 0x06, 0x40, 0x9a, 0xb3, 0x08, 0x12, 0x5f, 0x99, 0xa0, 0x74, 0xcc, 0x68,
        0x00, 0x4e, 0x89, 0x25, 0x45, 0xa9, 0x89, 0xb9, 0xd0, 0xc2, 0x86, 0x35, 0x15, 0x14, 0x15,
        0x00, 0x00, 0x00, 0x00, 0xff, 0xff,
    ];
    const SECOND: [u8; 12] = [
        0x22, 0x53, 0x33, 0xa8, 0xa4, 0x4a, 0x04, 0x00, 0x00, 0x00, 0xff, 0xff,
    ];

    fn adler(bytes: &[u8]) -> u32 {
        let (mut a, mut b) = (1_u32, 0_u32);
        for byte in bytes {
            a = (a + u32::from(*byte)) % 65521;
            b = (b + a) % 65521;
        }
        b << 16 | a
    }

    #[test]
    fn the_dictionary_is_the_protocols() {
        assert_eq!(dictionary().len(), 1423);
        assert_eq!(adler(&dictionary()).to_be_bytes(), NUMBER);
    }

    #[test]
    fn headers_are_read_one_block_after_the_other() {
        let mut headers = Headers::new();
        let with = |of: &str| {
            [("port", "8080"), ("requestid", "0"), ("streamtype", of)]
                .map(|(name, value)| (name.to_owned(), value.to_owned()))
        };
        assert_eq!(headers.read(&FIRST).unwrap(), with("error"));
        assert_eq!(headers.read(&SECOND).unwrap(), with("data"));
    }

    #[test]
    fn what_is_not_compressed_so_is_refused() {
        for end in 0..FIRST.len() - 8 {
            assert!(Headers::new().read(&FIRST[..end]).is_err(), "{end}");
        }
        for index in 0..FIRST.len() {
            let mut block = FIRST;
            block[index] ^= 0x55;
            // Whatever it says, it is read without a panic.
            let _ = Headers::new().read(&block);
        }
        assert!(parse(&[0xff, 0xff, 0xff, 0xff]).is_none());
    }
}
