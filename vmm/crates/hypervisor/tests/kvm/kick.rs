//! Kicks at every moment: before, in and after the guest.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use hypervisor::bare::{DATA, Ring};
use hypervisor::{Exit, Kicker, Stop, Vcpu, Vm, guest_code};

use crate::guest::guest;
use crate::needs_kvm;

/// Longest time that a kick may take on a machine that is busy with other things.
const LOST_AFTER: Duration = Duration::from_secs(10);

guest_code! {
    fn count() { "2: add qword ptr [rbx], 1", "jmp 2b" }
}

guest_code! {
    fn count_and_exit() { "2: add rax, 1", "out 0x10, al", "jmp 2b" }
}

#[test]
fn kick_before_running_is_not_lost() {
    needs_kvm!("kick_before_running_is_not_lost");
    for ring in [Ring::Kernel, Ring::User] {
        let mut guest = guest(count(), ring);
        guest.update_regs(|regs| regs.rbx = DATA);
        for _ in 0..100 {
            guest.vcpu.kicker().kick();
            assert_eq!(guest.vcpu.run().unwrap(), Stop::Kicked);
        }
        let mut counted = [0; 8];
        guest.vm.memory().read(DATA, &mut counted).unwrap();
        assert_eq!(counted, [0; 8], "a kicked vCPU does not enter the guest");
    }
}

/// Kicks once for each message, after a delay that differs from kick to kick, and calls out if
/// the kick is not answered.
fn kick_on_demand(kicker: &Kicker, asked: &mpsc::Receiver<u32>, answered: &AtomicU64) {
    for (count, delay) in asked.iter().enumerate() {
        for _ in 0..delay {
            std::hint::spin_loop();
        }
        kicker.kick();
        let since = std::time::Instant::now();
        while answered.load(Ordering::SeqCst) <= count as u64 {
            if since.elapsed() > LOST_AFTER {
                // Frees the vCPU's thread, which then sees the flag.
                LOST.store(true, Ordering::SeqCst);
                kicker.kick();
                return;
            }
            thread::yield_now();
        }
    }
}

static LOST: AtomicBool = AtomicBool::new(false);

#[test]
fn no_kick_is_lost_whenever_it_comes() {
    needs_kvm!("no_kick_is_lost_whenever_it_comes");
    const KICKS: u64 = 600;
    // With exits, so that kicks also meet the moments between two runs.
    let mut guest = guest(count_and_exit(), Ring::User);
    let kicker = guest.vcpu.kicker();
    let answered = AtomicU64::new(0);
    let (ask, asked) = mpsc::channel();
    thread::scope(|scope| {
        let answered = &answered;
        scope.spawn(move || kick_on_demand(&kicker, &asked, answered));
        let mut delay = 1u32;
        for count in 0..KICKS {
            ask.send(delay % 12_000).unwrap();
            delay = delay.wrapping_mul(1_664_525).wrapping_add(1_013_904_223) >> 3;
            loop {
                match guest.vcpu.run().unwrap() {
                    Stop::Kicked => break,
                    Stop::Exit(exit) => {
                        assert_eq!(
                            exit,
                            Exit::PortOut {
                                port: 0x10,
                                size: 1,
                                count: 1
                            }
                        );
                        if delay.is_multiple_of(7) {
                            assert_eq!(guest.vcpu.settle().unwrap(), Stop::Kicked);
                        }
                    }
                }
            }
            answered.store(count + 1, Ordering::SeqCst);
            assert!(!LOST.load(Ordering::SeqCst), "kick {count} was lost");
        }
        drop(ask);
    });
}

#[test]
fn registers_are_valid_after_a_kick() {
    needs_kvm!("registers_are_valid_after_a_kick");
    for ring in [Ring::Kernel, Ring::User] {
        let mut guest = guest(count(), ring);
        guest.update_regs(|regs| (regs.rbx, regs.r14) = (DATA, 0x1234));
        let kicker = guest.vcpu.kicker();
        let ram = guest.vm.memory().clone();
        thread::scope(|scope| {
            scope.spawn(move || {
                // Once the guest has counted, it is in the loop.
                let mut counted = [0; 8];
                while counted == [0; 8] {
                    thread::yield_now();
                    ram.read(DATA, &mut counted).unwrap();
                }
                kicker.kick();
            });
            assert_eq!(guest.vcpu.run().unwrap(), Stop::Kicked);
        });
        assert_eq!(guest.vcpu.regs().r14, 0x1234);
        let state = guest.vcpu.save().unwrap();
        assert_eq!(state.regs, *guest.vcpu.regs());
        assert_eq!(state.sregs, *guest.vcpu.sregs());
        assert_eq!(state.digest(), guest.vcpu.digest());
    }
}

extern "C" fn ignore(_signal: i32) {}

#[test]
fn signals_of_others_do_not_stop_the_guest() {
    needs_kvm!("signals_of_others_do_not_stop_the_guest");
    // SAFETY: a handler that does nothing, for a signal that nothing else here uses.
    unsafe { libc::signal(libc::SIGUSR2, ignore as extern "C" fn(i32) as usize) };
    let mut guest = guest(count(), Ring::User);
    guest.update_regs(|regs| regs.rbx = DATA);
    let kicker = guest.vcpu.kicker();
    let ram = guest.vm.memory().clone();
    // SAFETY: names the calling thread, which outlives the scope below.
    let this_thread = unsafe { libc::pthread_self() };
    thread::scope(|scope| {
        scope.spawn(move || {
            for _ in 0..50 {
                // SAFETY: the thread is alive: it waits for this scope.
                unsafe { libc::pthread_kill(this_thread, libc::SIGUSR2) };
                // Waits until the guest runs again.
                let (mut before, mut now) = ([0; 8], [0; 8]);
                ram.read(DATA, &mut before).unwrap();
                while {
                    ram.read(DATA, &mut now).unwrap();
                    now == before
                } {
                    thread::yield_now();
                }
            }
            kicker.kick();
        });
        assert_eq!(guest.vcpu.run().unwrap(), Stop::Kicked);
    });
    let mut counted = [0; 8];
    guest.vm.memory().read(DATA, &mut counted).unwrap();
    assert!(u64::from_le_bytes(counted) >= 50);
}
