//! Prints what this host can do for network slots.

fn main() {
    for capability in cubicle_net::probe().capabilities {
        println!("{:26} {:?}", capability.name, capability.state);
    }
}
