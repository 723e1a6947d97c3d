//! Ports that kernels are told to listen on.
//!
//! From when a port is chosen until its kernel listens on it, anybody may take it. The likeliest to do so
//! is Linux itself, which gives each connection a port of its own, those to other kernels that are
//! starting included. So kernels get none of the ports that it gives out.

use std::{
    collections::BTreeSet,
    io,
    net::{Ipv4Addr, TcpListener},
    ops::Range,
    sync::{Mutex, MutexGuard, PoisonError},
};

use uuid::Uuid;

/// Where ports are chosen from: above those of well-known servers, below those that Linux gives out
/// (`net.ipv4.ip_local_port_range`, from 32768 on unless it is changed).
const CHOICE: Range<u16> = 20_000..32_768;

/// Those of all kernels of this process, whoever started them: they share the machine's ports.
static GIVEN: Mutex<BTreeSet<u16>> = Mutex::new(BTreeSet::new());

/// Ports of one kernel. No other is given one of them until this is dropped.
#[derive(Debug)]
pub(crate) struct Ports {
    pub(crate) numbers: [u16; 5],
}

impl Ports {
    /// Chooses ports that nobody listens on.
    ///
    /// # Errors
    /// If there are not so many.
    pub(crate) fn reserve() -> io::Result<Self> {
        let mut given = given();
        // Anywhere: other programs may choose from the bottom.
        let start = (Uuid::new_v4().as_u128() % CHOICE.len() as u128) as u16;
        let mut free = (CHOICE.start + start..CHOICE.end)
            .chain(CHOICE.start..CHOICE.start + start)
            .filter(|port| !given.contains(port))
            .filter(|port| TcpListener::bind((Ipv4Addr::LOCALHOST, *port)).is_ok());
        let mut next = || free.next().ok_or(io::ErrorKind::AddrInUse);
        let numbers = [next()?, next()?, next()?, next()?, next()?];
        given.extend(numbers);
        Ok(Self { numbers })
    }
}

impl Drop for Ports {
    fn drop(&mut self) {
        let mut given = given();
        for number in self.numbers {
            given.remove(&number);
        }
    }
}

fn given() -> MutexGuard<'static, BTreeSet<u16>> {
    GIVEN.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    // One test, as all of a process share the ports.
    #[test]
    fn a_port_is_given_once_and_never_one_that_others_have_or_get() {
        let some = Ports::reserve().unwrap();
        assert!(some.numbers.iter().all(|number| CHOICE.contains(number)));
        let taken = some.numbers[2];
        let _listener = TcpListener::bind((Ipv4Addr::LOCALHOST, taken)).unwrap();
        drop(some);

        // As many as there are, so that each comes up.
        let all: Vec<Ports> = std::iter::from_fn(|| Ports::reserve().ok()).collect();
        let numbers: BTreeSet<u16> = all.iter().flat_map(|ports| ports.numbers).collect();
        assert!(all.len() > 1000);
        assert_eq!(numbers.len(), 5 * all.len());
        assert!(!numbers.contains(&taken));
        drop(all);
        assert!(given().is_empty());
    }
}
