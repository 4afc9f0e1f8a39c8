//! Saving and restoring a whole board.

use super::Board;
use crate::cmos::Cmos;
use crate::outbox::Outbox;
use crate::pci::Pci;
use crate::pic::Pics;
use crate::pit::Pit;
use crate::state::{BOARD_STATE_SCHEMA, BoardState, StateError};
use crate::uart::Uart;

/// More requests than any VM makes in its life; beyond it numbers could run out.
const REQUEST_IDS_MAX: u64 = 1 << 62;

impl Board {
    /// The state, complete. Effects must have been taken: they belong to the access that made them.
    pub fn save(&self) -> BoardState {
        assert!(!self.has_effects(), "effects must be taken before");
        BoardState {
            schema: BOARD_STATE_SCHEMA,
            config: self.config.clone(),
            now: self.now,
            next_request_id: self.outbox.next_request_id(),
            pic: self.pics.save(),
            pit: self.pit.save(),
            uart: self.uart.save(),
            cmos: self.cmos.save(),
            pci: self.pci.save(),
        }
    }

    /// The board that `state` was saved from. A state that no board can have is an error.
    pub fn restore(state: BoardState) -> Result<Board, StateError> {
        if state.schema != BOARD_STATE_SCHEMA {
            return Err(StateError::Schema(state.schema));
        }
        state.config.validate()?;
        let mut board = Board {
            now: state.now,
            pics: Pics::restore(&state.pic)?,
            pit: Pit::restore(&state.pit)?,
            uart: Uart::restore(&state.uart)?,
            cmos: Cmos::restore(&state.cmos)?,
            pci: Pci::restore(&state.config, state.pci)?,
            outbox: Outbox::new(state.next_request_id),
            config: state.config,
        };
        if board.outbox.next_request_id() > REQUEST_IDS_MAX {
            return Err(StateError::Invalid {
                device: "board",
                field: "next_request_id",
            });
        }
        let newest = board
            .outstanding()
            .iter()
            .filter_map(|effect| effect.request())
            .max();
        if newest.is_some_and(|id| id.0 >= board.outbox.next_request_id()) {
            return Err(StateError::Invalid {
                device: "board",
                field: "next_request_id",
            });
        }
        // Of a state saved this changes nothing.
        board.wire();
        Ok(board)
    }
}
