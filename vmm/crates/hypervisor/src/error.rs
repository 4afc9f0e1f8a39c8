//! What can go wrong at the boundary to KVM.

use crate::ram::RamError;

/// Setting up, saving or restoring a machine failed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// `/dev/kvm` does not exist.
    #[error("/dev/kvm does not exist: no KVM module is loaded, or virtualisation is switched off")]
    NoKvm(#[source] kvm_ioctls::Error),
    /// `/dev/kvm` exists and may not be opened.
    #[error("no permission for /dev/kvm: run as root or as a member of the group that owns it")]
    NoPermission(#[source] kvm_ioctls::Error),
    /// KVM speaks another version of its interface.
    #[error("KVM API version {found}, expected {expected}")]
    ApiVersion {
        /// What KVM reports.
        found: i32,
        /// The stable version of the interface.
        expected: i32,
    },
    /// A capability without which deterministic execution is impossible is missing.
    #[error("KVM lacks {0}")]
    MissingCapability(&'static str),
    /// A call to KVM failed.
    #[error("{call} failed")]
    Kvm {
        /// Name of the ioctl.
        call: &'static str,
        /// Its errno.
        #[source]
        source: kvm_ioctls::Error,
    },
    /// KVM refused to set an MSR to a value that it reported itself.
    #[error("KVM does not take {value:#x} for MSR {index:#x}")]
    MsrRefused {
        /// Number of the MSR.
        index: u32,
        /// The refused value.
        value: u64,
    },
    /// State was to be read or replaced while an access of the guest is not complete.
    #[error("the vCPU has an incomplete access: settle it first")]
    NotSettled,
    /// An interrupt was to be injected where the guest cannot take one.
    #[error("the guest cannot take interrupt vector {vector:#x} here")]
    NotInterruptible {
        /// The vector.
        vector: u8,
    },
    /// A saved state does not fit this machine.
    #[error("the saved vCPU state does not fit: {0}")]
    StateMismatch(String),
    /// The kernel refuses something that is not KVM.
    #[error("{call} failed")]
    Os {
        /// Name of the system call.
        call: &'static str,
        /// Its errno.
        #[source]
        source: std::io::Error,
    },
    /// A vCPU that was to be brought to rest could not run.
    #[error("settling the vCPU")]
    Run(#[from] RunError),
    /// The VMM's own code for [`crate::Vcpu::notice_writes`] did not run to its end.
    #[error("the VMM's own code in the guest stopped with {0}")]
    Notice(String),
    /// Guest memory.
    #[error("guest memory")]
    Ram(#[from] RamError),
}

impl Error {
    /// Wraps the errno of an ioctl with the ioctl's name.
    pub(crate) fn kvm(call: &'static str) -> impl FnOnce(kvm_ioctls::Error) -> Self {
        move |source| Self::Kvm { call, source }
    }
}

/// The vCPU cannot run on. None of these leaves a vCPU that may be run again.
#[derive(Debug, thiserror::Error)]
pub enum RunError {
    /// `KVM_RUN` itself failed.
    #[error("KVM_RUN failed")]
    Kvm(#[source] kvm_ioctls::Error),
    /// The processor refused to enter the guest.
    #[error("the processor refused to enter the guest, hardware reason {0:#x}")]
    FailEntry(u64),
    /// KVM found its own state broken (`KVM_EXIT_INTERNAL_ERROR` other than emulation).
    #[error("KVM internal error, suberror {0}")]
    Internal(u32),
    /// KVM could not reach guest memory.
    #[error("KVM could not reach guest memory at {gpa:#x}")]
    MemoryFault {
        /// Guest physical address.
        gpa: u64,
    },
    /// Access to a vCPU from a thread whose kick signal could not be set up.
    #[error("signal set-up")]
    Signal(#[source] std::io::Error),
    /// A fake vCPU has come to the end of its script, or of the instructions of one run.
    #[error("the fake vCPU is at the end of its script")]
    ScriptEnd,
}
