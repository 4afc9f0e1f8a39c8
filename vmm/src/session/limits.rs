//! The limits in force: whose word counts, and where they go.

use super::driver::Session;
use crate::api::{Limits, LimitsChange, Refused};

impl Session {
    /// The limits in force.
    pub(super) fn limits(&self) -> Limits {
        self.limits
    }

    /// The primary's limits are those of its backup, too: a failover changes none.
    pub(super) fn take_limits(&mut self, data: &[u8]) {
        let taken = serde_json::from_slice(data)
            .map_err(|error| error.to_string())
            .and_then(|change| {
                let changed = self.change_limits(&change);
                changed.map_err(|refused| refused.to_string())
            });
        if let Err(why) = taken {
            self.warn(
                "limits",
                &format!("those of the primary are not taken: {why}"),
            );
        }
    }

    /// An operator's limits: of the primary, which tells its backup.
    pub(super) fn take_operators_limits(
        &mut self,
        change: &LimitsChange,
    ) -> Result<Limits, Refused> {
        if !self.leader.is_live() {
            return Err(Refused::conflict(
                "no VM runs on this host whose limits could be changed",
                "ask the primary: its limits are those of its backup, too",
            ));
        }
        self.change_limits(change)
    }

    fn change_limits(&mut self, change: &LimitsChange) -> Result<Limits, Refused> {
        let limits = change.apply(&self.limits)?;
        self.channel
            .tune(limits.tuning())
            .map_err(|error| Refused::failed(error.to_string(), "look at the channel's daemon"))?;
        self.limits = limits;
        self.leader.set_limits(&limits);
        Ok(self.limits)
    }
}
