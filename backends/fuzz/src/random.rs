//! Scripts without a fuzzer: seeds, spoiled at random, the same every time.

/// A source of scripts.
#[derive(Debug)]
pub struct Generator {
    state: u64,
    seeds: Vec<Vec<u8>>,
}

impl Generator {
    /// The scripts of `seed` that come from these.
    pub fn new(seed: u64, seeds: Vec<Vec<u8>>) -> Self {
        Self {
            state: seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1,
            seeds,
        }
    }

    fn next(&mut self) -> u64 {
        // xorshift64*
        self.state ^= self.state >> 12;
        self.state ^= self.state << 25;
        self.state ^= self.state >> 27;
        self.state.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 16
    }

    fn below(&mut self, limit: usize) -> usize {
        (self.next() % limit.max(1) as u64) as usize
    }

    /// The next script, at most a few hundred bytes more than a seed.
    pub fn script(&mut self) -> Vec<u8> {
        let mut script = match self.below(self.seeds.len() + 1) {
            0 => Vec::new(),
            n => self.seeds[n - 1].clone(),
        };
        if self.below(3) == 0 && !self.seeds.is_empty() {
            let other = self.below(self.seeds.len());
            let from = self.below(self.seeds[other].len());
            script.extend_from_slice(&self.seeds[other][from..]);
        }
        for _ in 0..self.below(200) {
            script.push(self.next() as u8);
        }
        for _ in 0..self.below(12) {
            let at = self.below(script.len());
            let byte = self.next() as u8;
            match self.below(4) {
                0 if !script.is_empty() => drop(script.remove(at)),
                1 => script.insert(at, byte),
                _ if !script.is_empty() => script[at] = byte,
                _ => {}
            }
        }
        script
    }
}
