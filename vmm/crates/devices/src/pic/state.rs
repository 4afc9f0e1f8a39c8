//! Saved state of the interrupt controllers.

use serde::{Deserialize, Serialize};

/// Both 8259A.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[expect(missing_docs, reason = "the names are the chips'")]
pub struct PicState {
    pub master: ChipState,
    pub slave: ChipState,
}

/// One 8259A; bit n of a register is input n.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[expect(missing_docs, reason = "the names are the data sheet's")]
pub struct ChipState {
    /// Rising edges latched and not acknowledged.
    pub edges: u8,
    /// Levels of the inputs.
    pub lines: u8,
    pub in_service: u8,
    pub mask: u8,
    pub vector_base: u8,
    pub elcr: u8,
    pub init_step: InitStepState,
    pub wants_icw4: bool,
    pub single: bool,
    pub lowest_priority: u8,
    pub auto_eoi: bool,
    pub rotate_on_auto_eoi: bool,
    pub special_mask: bool,
    pub special_fully_nested: bool,
    pub poll: bool,
    pub read_in_service: bool,
}

/// The initialisation word that comes next.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[expect(missing_docs, reason = "the names are the data sheet's")]
pub enum InitStepState {
    Ready,
    Icw2,
    Icw3,
    Icw4,
}
