//! SIGINT and SIGTERM end a VM in order.

use signal_hook::consts::{SIGINT, SIGTERM};
use signal_hook::iterator::Signals;

use crate::vm::{Command, VcpuSender};

/// From now on the two signals stop the VM behind `sender`.
///
/// # Errors
/// Signals or the thread cannot be set up.
pub fn stop_on_signal(sender: &VcpuSender<Command>) -> std::io::Result<()> {
    let sender = sender.clone();
    on_stop(move || sender.command(Command::Stop))
}

/// From now on the two signals call `stop`, until it returns false.
///
/// # Errors
/// Signals or the thread cannot be set up.
pub fn on_stop(stop: impl Fn() -> bool + Send + 'static) -> std::io::Result<()> {
    let mut signals = Signals::new([SIGINT, SIGTERM])?;
    std::thread::Builder::new()
        .name("signals".to_owned())
        .spawn(move || {
            for signal in signals.forever() {
                tracing::info!(signal, "stopping");
                if !stop() {
                    return;
                }
            }
        })?;
    Ok(())
}
