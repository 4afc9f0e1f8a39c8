//! The owner word: a robust futex by which the daemon learns within a fraction of a millisecond that
//! the VMM is dead (R10).
//!
//! A thread that does nothing else holds the futex as long as the session lives. When the process dies,
//! however it dies, the kernel marks the word and wakes the daemon before it tears the memory down.
#![allow(unsafe_code)] // Registers a robust list with the kernel.

use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::sync::mpsc;
use std::thread::JoinHandle;

use ring::Mapping;

use super::{Error, io_error};

/// `struct robust_list_head` of linux/futex.h.
#[repr(C)]
struct RobustHead {
    first: *const Node,
    futex_offset: isize,
    pending: *const Node,
}

/// `struct robust_list`: the futex is `futex_offset` bytes from its node.
#[repr(C)]
struct Node {
    next: *const RobustHead,
}

/// Holds the owner word of one arena. Dropping it says that the VMM let go in order.
#[derive(Debug)]
pub(super) struct OwnerWord {
    release: mpsc::Sender<()>,
    thread: Option<JoinHandle<()>>,
}

impl OwnerWord {
    /// Takes the owner word of the control page in `mapping`.
    pub(super) fn hold(mapping: Arc<Mapping>) -> Result<Self, Error> {
        let (release, released) = mpsc::channel::<()>();
        let (held, is_held) = mpsc::sync_channel(1);
        let thread = std::thread::Builder::new()
            .name("ftlog-owner".to_owned())
            .spawn(move || own(&mapping, &held, &released))
            .map_err(io_error("start the owner thread"))?;
        is_held
            .recv()
            .unwrap_or_else(|_| Err(std::io::Error::other("the owner thread is gone")))
            .map_err(io_error("set_robust_list"))?;
        Ok(Self {
            release,
            thread: Some(thread),
        })
    }
}

impl Drop for OwnerWord {
    fn drop(&mut self) {
        // The thread ends when it is told or the sender is gone; it cannot panic.
        let _ = self.release.send(());
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// The whole life of an owner thread.
fn own(
    mapping: &Mapping,
    held: &mpsc::SyncSender<std::io::Result<()>>,
    released: &mpsc::Receiver<()>,
) {
    let word = match mapping.control_at(0) {
        Ok(control) => &control.owner.word,
        Err(error) => {
            let _ = held.send(Err(std::io::Error::other(error)));
            return;
        }
    };
    let mut node = Box::pin(Node {
        next: std::ptr::null(),
    });
    let node_at: *const Node = &raw const *node;
    let head = Box::pin(RobustHead {
        first: node_at,
        futex_offset: (word.as_ptr() as isize).wrapping_sub(node_at as isize),
        pending: std::ptr::null(),
    });
    link(node.as_mut(), &head);
    let tid = rustix::thread::gettid().as_raw_nonzero().get() as u32;
    word.store(tid, Ordering::Release);
    let result = set_robust_list(&head);
    let ok = result.is_ok();
    let _ = held.send(result);
    if ok {
        // Either answer means the same: let go.
        let _ = released.recv();
    }
    word.store(0, Ordering::Release);
    let _ =
        rustix::thread::futex::wake(word, rustix::thread::futex::Flags::empty(), i32::MAX as u32);
    // The C library's own list of this thread was empty: robust mutexes are not used here. An empty
    // list in its place, so that the kernel does not look at the memory that is now freed.
    let empty = Box::leak(Box::new(RobustHead {
        first: std::ptr::null(),
        futex_offset: 0,
        pending: std::ptr::null(),
    }));
    empty.first = (&raw const *empty).cast();
    let _ = set_robust_list(empty);
}

/// Closes the circular list: its last node points to the head.
fn link(mut node: Pin<&mut Node>, head: &Pin<Box<RobustHead>>) {
    node.next = &raw const **head;
}

fn set_robust_list(head: &RobustHead) -> std::io::Result<()> {
    let at: *const RobustHead = head;
    // SAFETY: the head and its node stay where they are until the list is replaced or the thread
    // ends; the futex is in a mapping that the thread keeps.
    let result = unsafe { libc::syscall(libc::SYS_set_robust_list, at, size_of::<RobustHead>()) };
    if result == 0 {
        Ok(())
    } else {
        Err(std::io::Error::last_os_error())
    }
}

#[cfg(test)]
mod tests {
    use ring::{Arena, Owner};

    use super::*;

    #[test]
    fn the_word_names_a_thread_and_is_zero_after_letting_go() {
        let arena = Arena::create(8192).unwrap();
        let mapping = Arc::new(Mapping::of_file(&arena, 0, 8192).unwrap());
        let owner = OwnerWord::hold(Arc::clone(&mapping)).unwrap();
        let word = &mapping.control_at(0).unwrap().owner.word;
        assert_ne!(word.load(Ordering::Acquire) & Owner::TID, 0);
        drop(owner);
        assert_eq!(word.load(Ordering::Acquire), 0);
    }
}
