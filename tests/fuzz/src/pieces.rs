//! Input that is several pieces: each is a length of two bytes and as many bytes as there are.

/// Takes pieces from the front of an input; what is missing is empty.
pub struct Pieces<'a>(&'a [u8]);

impl<'a> Pieces<'a> {
    /// Of this input.
    pub fn of(data: &'a [u8]) -> Pieces<'a> {
        Pieces(data)
    }

    /// One byte, 0 at the end.
    pub fn byte(&mut self) -> u8 {
        let Some((first, rest)) = self.0.split_first() else { return 0 };
        self.0 = rest;
        *first
    }

    /// Eight bytes as a number, little-endian.
    pub fn number(&mut self) -> u64 {
        u64::from_le_bytes(std::array::from_fn(|_| self.byte()))
    }

    /// The next piece.
    pub fn piece(&mut self) -> &'a [u8] {
        let length = usize::from(u16::from_le_bytes([self.byte(), self.byte()]));
        let (piece, rest) = self.0.split_at(length.min(self.0.len()));
        self.0 = rest;
        piece
    }

    /// Whether nothing is left.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// All that is left.
    pub fn rest(self) -> &'a [u8] {
        self.0
    }
}

/// A piece as [`Pieces::piece`] takes it.
pub fn piece(bytes: &[u8]) -> Vec<u8> {
    let length = u16::try_from(bytes.len()).expect("a seed's pieces are short");
    [&length.to_le_bytes(), bytes].concat()
}
