#![allow(unsafe_code)]
use hypervisor::bare::*;
use hypervisor::*;
guest_code! { fn cpuid() { "2: cpuid", "out 0x10, al", "jmp 2b" } }
guest_code! { fn rdtsc() { "2: rdtsc", "out 0x10, al", "jmp 2b" } }
fn main() {
    for full in [true, false] {
        for set_early in [true, false] {
            let vm = kvm::KvmVm::new(GuestRam::new(16 << 20).unwrap()).unwrap();
            let s = vm.supported_cpuid().unwrap();
            let t = if full {
                s
            } else {
                CpuidTable::restricted(&s, CpuidPolicy::default())
            };
            let mut g = BareGuest::with_cpuid(vm, t, cpuid(), Ring::User).unwrap();
            if set_early {
                println!("early {:?}", g.vcpu.set_cpuid_fault(true));
            }
            for i in 0..3 {
                let s = g.vcpu.run().unwrap();
                println!(
                    "{s:?} cpl {} rip {:x}",
                    g.vcpu.sregs().cs.dpl,
                    g.vcpu.regs().rip
                );
                if !set_early && i == 0 {
                    println!("late {:?}", g.vcpu.set_cpuid_fault(true));
                }
                g.vcpu.settle().unwrap();
                println!(
                    " msr {:?} {:x?}",
                    g.vcpu.save().unwrap().msr(0x140),
                    g.vcpu.save().unwrap().msr(0xce)
                );
            }
        }
    }
    // trap without TSD
    let mut g = BareGuest::new(16 << 20, rdtsc(), Ring::User).unwrap();
    g.vcpu.set_trap_tsc(true);
    println!("trap no TSD {:?} {:x}", g.vcpu.run(), g.vcpu.regs().rip);
}
