//! What other hosts say to a primary.

use crate::action::{Action, Leave, Notice};
use crate::context::{Context, newer};
use crate::names::HostId;
use crate::peer::{Holds, PeerMessage, Refusal};

use super::link::{Link, Stage};
use super::{Primary, Verdict};

impl Primary {
    pub(super) fn peer_message(
        &mut self,
        ctx: &mut Context<'_>,
        from: HostId,
        message: PeerMessage,
    ) -> Verdict {
        match message {
            PeerMessage::StateQuery { nonce, epoch } => {
                let holds = Holds {
                    state: true,
                    writes: true,
                };
                ctx.reply_holds(from, nonce, holds);
                // Only who won a newer epoch speaks as its primary.
                if newer(self.record.epoch, epoch) {
                    return Err(Leave::Superseded);
                }
            }
            PeerMessage::StateReply { nonce, holds } => self.fold.replied(from, nonce, holds),
            PeerMessage::Join { epoch, .. } if newer(self.record.epoch, Some(epoch)) => {
                return Err(Leave::Superseded);
            }
            PeerMessage::GaveUp {
                session,
                cause,
                report,
            } => {
                if self.dropped == Some((from, session)) {
                    self.dropped = None;
                }
                if self.speaks_for(from, session) {
                    if let Some(report) = report {
                        ctx.notice(Notice::Diverged(report.bounded()));
                    }
                    self.give_link_up(ctx, cause, format!("it gave up: {cause:?}"));
                }
            }
            PeerMessage::Accepted { session }
            | PeerMessage::Refused { session, .. }
            | PeerMessage::Synced { session, .. }
            | PeerMessage::Confirmed { session, .. }
                if self.speaks_for(from, session) =>
            {
                self.standby_says(ctx, from, message);
            }
            // What only a primary says, and what belongs to another session.
            _ => {}
        }
        Ok(())
    }

    fn speaks_for(&self, from: HostId, session: format::SessionId) -> bool {
        let link = self.link.as_ref();
        link.is_some_and(|link| link.peer == from && link.session == session)
    }

    /// The standby of the link speaks, in the link's session.
    fn standby_says(&mut self, ctx: &mut Context<'_>, from: HostId, message: PeerMessage) {
        let epoch = self.record.epoch;
        let Some(link) = &mut self.link else { return };
        let session = link.session;
        match (message, link.stage) {
            (PeerMessage::Accepted { .. }, Stage::Joining { .. }) => {
                link.accepted(ctx);
                // A standby has no I/O of an earlier role left, or it would not be one.
                self.fold.gone(from);
                ctx.act(Action::Watch {
                    peer: from,
                    session,
                });
                ctx.act(Action::StartTransfer {
                    to: from,
                    session,
                    epoch,
                });
            }
            (PeerMessage::Refused { why, .. }, Stage::Joining { .. }) => {
                self.refused(ctx, from, why)
            }
            (
                PeerMessage::Synced {
                    bytes, replayed, ..
                },
                _,
            ) => {
                link.heard();
                link.synced(ctx.now, bytes, replayed);
            }
            (PeerMessage::Confirmed { upto, .. }, Stage::Confirming { upto: asked })
                if upto >= asked =>
            {
                link.stage = Stage::Confirmed;
                Link::heard(link);
            }
            _ => {}
        }
    }

    fn refused(&mut self, ctx: &mut Context<'_>, standby: HostId, why: Refusal) {
        match why {
            Refusal::Busy => {}
            Refusal::Fingerprint(differences) => ctx.notice(Notice::StandbyDiffers {
                standby,
                differences,
            }),
        }
        self.abort_protection(ctx);
    }
}
