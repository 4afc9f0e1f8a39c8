//! The VM's console: a person's terminal in raw mode, or plain files.
//!
//! On a terminal, Ctrl-A is the escape: Ctrl-A x leaves, Ctrl-A Ctrl-A sends one Ctrl-A. The terminal
//! is put back as it was when the console is dropped.
#![allow(unsafe_code)] // Raw descriptors of standard input and output.

use std::fs::{File, OpenOptions};
use std::io::{self, IsTerminal};
use std::os::fd::{AsRawFd, BorrowedFd, RawFd};
use std::path::Path;

use rustix::termios::{OptionalActions, Termios, tcgetattr, tcsetattr};

const ESCAPE: u8 = 0x01;

/// What a person typed.
#[derive(Debug, PartialEq, Eq)]
pub enum Typed {
    /// Bytes for the guest; may be none.
    Bytes(Vec<u8>),
    /// Ctrl-A x.
    Quit,
}

/// A console.
pub struct Console {
    input: File,
    output: File,
    before: Option<Termios>,
    escaped: bool,
}

impl Console {
    /// Standard input and output; raw mode where they are a terminal.
    ///
    /// # Errors
    /// They cannot be used.
    pub fn stdio() -> io::Result<Self> {
        // SAFETY: descriptors 0 and 1 are open for the life of the process.
        let (stdin, stdout) = unsafe { (BorrowedFd::borrow_raw(0), BorrowedFd::borrow_raw(1)) };
        let input = File::from(stdin.try_clone_to_owned()?);
        let output = File::from(stdout.try_clone_to_owned()?);
        let before = if input.is_terminal() {
            Some(make_raw(&input)?)
        } else {
            None
        };
        Ok(Self {
            input,
            output,
            before,
            escaped: false,
        })
    }

    /// No input, output appended to a file.
    ///
    /// # Errors
    /// The file cannot be made.
    pub fn file(path: &Path) -> io::Result<Self> {
        let output = OpenOptions::new().create(true).append(true).open(path)?;
        let input = File::open("/dev/null")?;
        Ok(Self {
            input,
            output,
            before: None,
            escaped: false,
        })
    }

    /// The descriptor to read from.
    #[must_use]
    pub fn input(&self) -> RawFd {
        self.input.as_raw_fd()
    }

    /// The descriptor to write to.
    #[must_use]
    pub fn output(&self) -> RawFd {
        self.output.as_raw_fd()
    }

    /// Sorts what was typed into bytes for the guest and the wish to leave.
    pub fn typed(&mut self, bytes: &[u8]) -> Typed {
        if self.before.is_none() {
            return Typed::Bytes(bytes.to_vec());
        }
        let mut out = Vec::with_capacity(bytes.len());
        for &byte in bytes {
            match (self.escaped, byte) {
                (false, ESCAPE) => self.escaped = true,
                (true, b'x' | b'X') => return Typed::Quit,
                (true, _) | (false, _) => {
                    self.escaped = false;
                    out.push(byte);
                }
            }
        }
        Typed::Bytes(out)
    }
}

impl Drop for Console {
    fn drop(&mut self) {
        if let Some(before) = &self.before {
            let _ = tcsetattr(&self.input, OptionalActions::Flush, before);
        }
    }
}

fn make_raw(terminal: &File) -> io::Result<Termios> {
    let before = tcgetattr(terminal)?;
    let mut raw = before.clone();
    raw.make_raw();
    tcsetattr(terminal, OptionalActions::Now, &raw)?;
    Ok(before)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn console(terminal: bool) -> Console {
        let mut console = Console::file(Path::new("/dev/null")).unwrap();
        if terminal {
            let (_master, slave) = pty();
            console.before = Some(tcgetattr(&slave).unwrap());
        }
        console
    }

    fn pty() -> (File, File) {
        let master = rustix::pty::openpt(rustix::pty::OpenptFlags::RDWR).unwrap();
        rustix::pty::grantpt(&master).unwrap();
        rustix::pty::unlockpt(&master).unwrap();
        let name = rustix::pty::ptsname(&master, Vec::new()).unwrap();
        let slave = File::options()
            .read(true)
            .write(true)
            .open(name.to_str().unwrap())
            .unwrap();
        (File::from(master), slave)
    }

    #[test]
    fn ctrl_a_x_leaves_and_ctrl_a_twice_types_it() {
        let mut console = console(true);
        assert_eq!(console.typed(b"ls\n"), Typed::Bytes(b"ls\n".to_vec()));
        assert_eq!(console.typed(&[ESCAPE]), Typed::Bytes(vec![]));
        assert_eq!(
            console.typed(&[ESCAPE, b'a']),
            Typed::Bytes(vec![ESCAPE, b'a'])
        );
        assert_eq!(console.typed(&[b'q', ESCAPE, b'x']), Typed::Quit);
    }

    #[test]
    fn without_a_terminal_every_byte_is_the_guests() {
        let mut console = console(false);
        assert_eq!(
            console.typed(&[ESCAPE, b'x']),
            Typed::Bytes(vec![ESCAPE, b'x'])
        );
    }
}
