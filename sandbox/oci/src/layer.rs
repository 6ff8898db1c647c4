//! A layer as the tar it holds, with both of its digests checked on the way.
//!
//! Used by `rootfs`. What has been read is to be trusted only after [`LayerReader::finish`] said
//! yes; until then it lies in a directory that nobody uses.

use std::io::{self, BufRead as _, BufReader, Read};

use flate2::read::MultiGzDecoder;
use ruzstd::decoding::{
    BlockDecodingStrategy, FrameDecoder,
    errors::{FrameDecoderError, ReadFrameHeaderError},
};

use crate::{
    digest::{Digest, Hashing},
    image::{Compression, Layer, Span},
};

/// What `zstd` itself takes without being asked twice: memory that a layer makes us allocate.
const MOST_WINDOW: u64 = 128 << 20;

/// Reads the tar in a layer.
pub(crate) struct LayerReader {
    tar: Hashing<Unpacked>,
    blob: Digest,
    diff_id: Digest,
}

enum Unpacked {
    Plain(Hashing<Span>),
    Gzip(Box<MultiGzDecoder<Hashing<Span>>>),
    Zstd(Box<Zstd<Hashing<Span>>>),
}

/// What is wrong with a layer that has been read to its end.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Mismatch {
    /// The blob has this digest.
    Blob(Digest),
    /// The tar in it has.
    Tar(Digest),
}

impl LayerReader {
    pub(crate) fn new(layer: &Layer, blob: Span) -> Self {
        let blob = Hashing::new(blob);
        let unpacked = match layer.compression {
            Compression::None => Unpacked::Plain(blob),
            Compression::Gzip => Unpacked::Gzip(Box::new(MultiGzDecoder::new(blob))),
            Compression::Zstd => Unpacked::Zstd(Box::new(Zstd::new(blob))),
        };
        Self {
            tar: Hashing::new(unpacked),
            blob: layer.digest,
            diff_id: layer.diff_id,
        }
    }

    /// Bytes of the tar read so far.
    pub(crate) fn count(&self) -> u64 {
        self.tar.count()
    }

    /// Whether the blob is what its name says, for when what is in it makes no sense.
    pub(crate) fn blob_digest(&mut self) -> io::Result<Result<(), Mismatch>> {
        let blob = self.tar.get_mut().blob();
        io::copy(blob, &mut io::sink())?;
        let found = blob.digest();
        Ok(if found == self.blob {
            Ok(())
        } else {
            Err(Mismatch::Blob(found))
        })
    }

    /// To be called at the end of the tar.
    pub(crate) fn finish(mut self) -> io::Result<Result<(), Mismatch>> {
        if let Err(mismatch) = self.blob_digest()? {
            return Ok(Err(mismatch));
        }
        let found = self.tar.digest();
        Ok(if found == self.diff_id {
            Ok(())
        } else {
            Err(Mismatch::Tar(found))
        })
    }
}

impl Read for LayerReader {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        self.tar.read(into)
    }
}

impl Unpacked {
    fn blob(&mut self) -> &mut Hashing<Span> {
        match self {
            Self::Plain(blob) => blob,
            Self::Gzip(decoder) => decoder.get_mut(),
            Self::Zstd(decoder) => decoder.from.get_mut(),
        }
    }
}

impl Read for Unpacked {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        match self {
            Self::Plain(blob) => blob.read(into),
            Self::Gzip(decoder) => decoder.read(into),
            Self::Zstd(decoder) => decoder.read(into),
        }
    }
}

/// The frames of a zstd stream one after the other, skippable ones left out: the crate's own
/// reader stops after the first, and layers made to be fetched in parts (zstd:chunked) have many.
struct Zstd<R> {
    from: BufReader<R>,
    decoder: FrameDecoder,
    in_frame: bool,
}

impl<R: Read> Zstd<R> {
    fn new(from: R) -> Self {
        let mut decoder = FrameDecoder::new();
        decoder.set_max_window_size(MOST_WINDOW);
        Self {
            from: BufReader::with_capacity(64 << 10, from),
            decoder,
            in_frame: false,
        }
    }

    /// Whether there is another frame to decode.
    fn next_frame(&mut self) -> io::Result<bool> {
        loop {
            if self.from.fill_buf()?.is_empty() {
                return Ok(false);
            }
            match self.decoder.init(&mut self.from) {
                Ok(()) => return Ok(true),
                Err(FrameDecoderError::ReadFrameHeaderError(ReadFrameHeaderError::SkipFrame {
                    length,
                    ..
                })) => {
                    let mut skipped = (&mut self.from).take(length.into());
                    if io::copy(&mut skipped, &mut io::sink())? < u64::from(length) {
                        return Err(io::ErrorKind::UnexpectedEof.into());
                    }
                }
                Err(error) => return Err(io::Error::other(error)),
            }
        }
    }
}

impl<R: Read> Read for Zstd<R> {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        if into.is_empty() {
            return Ok(0);
        }
        loop {
            if !self.in_frame {
                self.in_frame = self.next_frame()?;
                if !self.in_frame {
                    return Ok(0);
                }
            }
            while self.decoder.can_collect() == 0 && !self.decoder.is_finished() {
                self.decoder
                    .decode_blocks(&mut self.from, BlockDecodingStrategy::UptoBlocks(1))
                    .map_err(io::Error::other)?;
            }
            match self.decoder.read(into)? {
                0 => self.in_frame = false,
                read => return Ok(read),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{compress, program_is_there};

    fn unpack(bytes: &[u8]) -> io::Result<Vec<u8>> {
        let mut out = Vec::new();
        Zstd::new(bytes).read_to_end(&mut out)?;
        Ok(out)
    }

    #[test]
    fn all_frames_count_and_skippable_ones_do_not() {
        if !program_is_there("all_frames_count", "zstd", "zstd") {
            return;
        }
        let text = b"pericarp ".repeat(50_000);
        let mut bytes = compress("zstd", &text);
        bytes.extend_from_slice(b"\x50\x2a\x4d\x18\x03\0\0\0abc");
        bytes.extend(compress("zstd", b"end"));
        bytes.extend_from_slice(b"\x5f\x2a\x4d\x18\0\0\0\0");
        let mut expected = text;
        expected.extend_from_slice(b"end");
        assert_eq!(unpack(&bytes).unwrap(), expected);

        // Cut anywhere, it is an error and never a shorter text.
        for cut in [3, 10, bytes.len() - 1, bytes.len() - 10] {
            assert!(unpack(&bytes[..cut]).is_err(), "{cut}");
        }
        bytes.extend_from_slice(b"garbage");
        assert!(unpack(&bytes).is_err());
    }

    #[test]
    fn a_window_that_takes_gigabytes_is_refused() {
        // Magic, descriptor without content size or single segment, the largest window.
        assert!(unpack(b"\x28\xb5\x2f\xfd\x00\xf8\x01\x00\x00").is_err());
    }
}
