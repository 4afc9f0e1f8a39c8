//! Small traits for a virtual machine and its vCPU, KVM behind them, and a scripted fake.
