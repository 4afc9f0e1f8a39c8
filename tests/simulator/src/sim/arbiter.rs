//! The arbiter's thread of a VMM: one call at a time, step by step through the directory on the shared
//! storage, with all the errors that a directory on a network has.

use ft::directory::{DirectoryCall, DirectoryStep, FileOp, FileResult, record_epoch};
use ft::{ArbiterReply, ArbiterRequest, CallId, Event};

use crate::plan::MS;

use super::{Ev, Sim};

impl Sim {
    pub(super) fn ask_arbiter(&mut self, host: usize, call: CallId, request: ArbiterRequest) {
        let inc = self.hosts[host].vmm.as_ref().map_or(0, |vmm| vmm.inc);
        let id = self.hosts[host].id;
        let claims = match &request {
            ArbiterRequest::TryWin { record, .. } => {
                self.check.claims(inc, id, record);
                true
            }
            ArbiterRequest::Newest => false,
        };
        let Some(vmm) = self.hosts[host].vmm.as_mut() else {
            return;
        };
        vmm.calls
            .push_back((call, DirectoryCall::new(id, call, request)));
        if vmm.calls.len() == 1 {
            self.step_arbiter(host, None);
        }
        if claims {
            self.milestone(host, "claim");
        }
    }

    fn step_arbiter(&mut self, host: usize, result: Option<FileResult>) {
        let place = &mut self.hosts[host];
        let boot = place.boot;
        let Some(vmm) = place.vmm.as_mut() else {
            return;
        };
        let inc = vmm.inc;
        let Some((id, call)) = vmm.calls.front_mut() else {
            return;
        };
        let id = *id;
        match call.step(result) {
            DirectoryStep::Do(op) => {
                place.ios += 1;
                let us = self.plan.options.dir_us;
                let ns = self.work(host, us);
                self.after(
                    ns,
                    Ev::DirOp {
                        host,
                        inc,
                        boot,
                        op,
                    },
                );
            }
            DirectoryStep::Answer { reply, leftover } => {
                vmm.calls.pop_front();
                if let Some(name) = leftover {
                    self.store.remove(&name);
                }
                if ft::canary::on(ft::canary::Canary::RecordPruned) && reply == ArbiterReply::Won {
                    self.store.prune();
                }
                self.tell(host, Event::Arbiter { call: id, reply });
                let more = self.hosts[host]
                    .vmm
                    .as_ref()
                    .is_some_and(|vmm| !vmm.calls.is_empty());
                if more {
                    self.step_arbiter(host, None);
                }
            }
        }
    }

    /// An operation reaches the storage: or not yet, or never.
    pub(super) fn dir_op(&mut self, host: usize, inc: u32, boot: u32, op: FileOp) {
        let same = self.hosts[host].boot == boot;
        if !same && (!self.store.lands(host, boot) || self.rng.chance(500_000)) {
            return;
        }
        if same && !self.reaches_storage(host) {
            return self.after(
                10 * MS,
                Ev::DirOp {
                    host,
                    inc,
                    boot,
                    op,
                },
            );
        }
        if same {
            self.hosts[host].ios -= 1;
        }
        let options = &self.plan.options;
        let (plain, done) = if self.healed {
            (0, 0)
        } else {
            (options.dir_error, options.dir_done_error)
        };
        let failed = || FileResult::Failed("simulated error".to_owned());
        let result = if self.rng.chance(plain) {
            failed()
        } else {
            let result = self.file(host, boot, &op);
            if self.rng.chance(done) {
                failed()
            } else {
                result
            }
        };
        let us = self.plan.options.dir_us;
        let ns = self.work(host, us);
        self.after(ns, Ev::DirDone { host, inc, result });
    }

    pub(super) fn dir_done(&mut self, host: usize, result: FileResult) {
        self.step_arbiter(host, Some(result));
    }

    fn file(&mut self, host: usize, boot: u32, op: &FileOp) -> FileResult {
        let now = self.now;
        let stale = if self.healed {
            0
        } else {
            self.plan.options.stale_us * 1_000
        };
        match op {
            FileOp::List => FileResult::Names(self.store.list(host, now, stale)),
            FileOp::Read(name) => match self.store.read(host, name, now, stale) {
                Some(bytes) => FileResult::Content(bytes),
                None => FileResult::NotFound,
            },
            FileOp::Create(name, bytes) => {
                self.store.create(host, name, bytes);
                let ns = self.rng.range(20, 60) * MS;
                let name = name.clone();
                self.after(ns, Ev::Writeback { host, boot, name });
                FileResult::Done
            }
            FileOp::Link(from, to) => {
                let linked = self.store.link(host, from, to, now);
                if linked == FileResult::Done {
                    self.log(host, format_args!("storage: {to} is linked"));
                    if let Some(epoch) = record_epoch(to) {
                        let record = self.store.truth(to);
                        let tenure = record.as_ref().map(|record| record.tenure);
                        if let Some(ft::Tenure::Pair { session, .. }) = tenure {
                            self.check.named(self.now, session);
                        }
                        let wrong = self.check.recorded(epoch, record);
                        if let Some(why) = wrong {
                            self.violated("record", format_args!("{why}"));
                        }
                    }
                    self.milestone(host, "linked");
                }
                linked
            }
            FileOp::SyncFile(name) => {
                self.store.sync(host, name);
                FileResult::Done
            }
            FileOp::SyncDirectory => FileResult::Done,
        }
    }

    /// The kernel writes its cache back some time.
    pub(super) fn writeback(&mut self, host: usize, boot: u32, name: &str) {
        if self.hosts[host].boot != boot {
            return;
        }
        if !self.reaches_storage(host) {
            let name = name.to_owned();
            return self.after(20 * MS, Ev::Writeback { host, boot, name });
        }
        self.store.sync(host, name);
    }
}
