//! Puts together the few instructions of a stub: bytes, near jumps to kernel symbols, short jumps
//! to labels within the stub.
//!
//! Targets of short jumps must be at most 127 bytes ahead, or 128 behind: stubs are small and written in
//! this crate, so a miss is a mistake of ours.

/// A place within the stub, perhaps not yet known.
#[derive(Clone, Copy)]
pub(crate) struct Label(usize);

/// Code that will run at a known address.
pub(crate) struct Asm {
    base: u64,
    code: Vec<u8>,
    labels: Vec<Option<usize>>,
    short_jumps: Vec<(usize, Label)>,
}

impl Asm {
    /// Starts a stub at virtual address `base`.
    pub(crate) fn at(base: u64) -> Self {
        Asm {
            base,
            code: Vec::new(),
            labels: Vec::new(),
            short_jumps: Vec::new(),
        }
    }

    /// Appends bytes as they are.
    pub(crate) fn raw(&mut self, bytes: &[u8]) -> &mut Self {
        self.code.extend_from_slice(bytes);
        self
    }

    /// `jmp target`.
    pub(crate) fn jmp(&mut self, target: u64) -> &mut Self {
        self.near(0xe9, target)
    }

    /// `call target`.
    pub(crate) fn call(&mut self, target: u64) -> &mut Self {
        self.near(0xe8, target)
    }

    /// A label to jump to, to be put down later by [`Asm::label`].
    pub(crate) fn forward(&mut self) -> Label {
        self.labels.push(None);
        Label(self.labels.len() - 1)
    }

    /// A label of this place, to jump back to.
    pub(crate) fn here(&mut self) -> Label {
        self.labels.push(Some(self.code.len()));
        Label(self.labels.len() - 1)
    }

    /// Puts a label here.
    pub(crate) fn label(&mut self, label: Label) -> &mut Self {
        self.labels[label.0] = Some(self.code.len());
        self
    }

    /// A short jump: `opcode` is 74 for `jz`, 75 for `jnz`, EB for one without condition.
    pub(crate) fn short(&mut self, opcode: u8, label: Label) -> &mut Self {
        self.code.extend_from_slice(&[opcode, 0]);
        self.short_jumps.push((self.code.len(), label));
        self
    }

    /// The finished code.
    pub(crate) fn finish(mut self) -> Vec<u8> {
        for (from, label) in &self.short_jumps {
            let to = self.labels[label.0].expect("every label of a stub is put down");
            let distance = to.cast_signed() - from.cast_signed();
            let distance = i8::try_from(distance).expect("a short jump reaches 127 bytes");
            self.code[from - 1] = distance.cast_unsigned();
        }
        self.code
    }

    fn near(&mut self, opcode: u8, target: u64) -> &mut Self {
        let instruction = self.base + self.code.len() as u64;
        self.code
            .extend_from_slice(&near_branch(opcode, instruction, target));
        self
    }
}

/// `E8` or `E9` with the distance from the instruction at `from` to `target`.
pub(crate) fn near_branch(opcode: u8, from: u64, target: u64) -> [u8; 5] {
    let distance = target.wrapping_sub(from.wrapping_add(5)).cast_signed();
    let distance = i32::try_from(distance).expect("kernel text spans less than 2 GiB");
    let [a, b, c, d] = distance.to_le_bytes();
    [opcode, a, b, c, d]
}

/// The instructions of a stub at `base`, a line each: what tests compare.
#[cfg(test)]
pub(crate) fn listing(code: &[u8], base: u64) -> String {
    use iced_x86::{Decoder, DecoderOptions, Formatter, IntelFormatter};

    let mut formatter = IntelFormatter::new();
    let mut out = String::new();
    for insn in Decoder::with_ip(64, code, base, DecoderOptions::NONE) {
        formatter.format(&insn, &mut out);
        out.push('\n');
    }
    out
}
