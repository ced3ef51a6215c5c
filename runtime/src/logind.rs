//! logind's delay of a shutdown: who holds its lock hears of a shutdown before it happens, and has a while.

use std::{
    os::{fd::OwnedFd, unix::net::UnixStream},
    path::Path,
    time::Duration,
};

use crate::{
    dbus::{Body, Bus},
    error::{Context, Error, Kind, Result},
};

const LOGIND: (&str, &str, &str) =
    ("org.freedesktop.login1", "/org/freedesktop/login1", "org.freedesktop.login1.Manager");
const PROPERTIES: (&str, &str, &str) = (LOGIND.0, LOGIND.1, "org.freedesktop.DBus.Properties");
const BUS: (&str, &str, &str) = ("org.freedesktop.DBus", "/org/freedesktop/DBus", "org.freedesktop.DBus");
const SYSTEMD: (&str, &str, &str) =
    ("org.freedesktop.systemd1", "/org/freedesktop/systemd1", "org.freedesktop.systemd1.Manager");
/// The signal that says whether a shutdown is coming or was called off.
const SIGNAL: &str = "PrepareForShutdown";

/// A connection to logind.
#[derive(Debug)]
pub struct Logind {
    bus: Bus,
}

impl Logind {
    /// Connects through the system bus whose socket is at `path`, and listens.
    ///
    /// # Errors
    /// When there is no bus or it refuses.
    pub fn connect(path: &Path) -> Result<Self> {
        let mut bus = Bus::connect(path)?;
        let rule = format!("type='signal',interface='{}',member='{SIGNAL}',path='{}'", LOGIND.2, LOGIND.1);
        bus.call(BUS, "AddMatch", Body::default().text(&rule))?;
        Ok(Self { bus })
    }

    /// The longest delay that logind grants.
    ///
    /// # Errors
    /// When it does not answer.
    pub fn longest_delay(&mut self) -> Result<Duration> {
        let body = Body::default().text(LOGIND.2).text("InhibitDelayMaxUSec");
        let answer = self.bus.call(PROPERTIES, "Get", body)?.arguments();
        let micros = answer.first().and_then(|text| text.parse().ok());
        let bad = || Error::new(Kind::System, format!("logind says its longest delay is {answer:?}"));
        micros.map(Duration::from_micros).ok_or_else(bad)
    }

    /// Makes logind read its configuration again.
    ///
    /// # Errors
    /// When systemd does not answer or refuses.
    pub fn reload(&mut self) -> Result<()> {
        let body = Body::default().text("systemd-logind.service").text("all").number(libc::SIGHUP);
        self.bus.call(SYSTEMD, "KillUnit", body).map(drop)
    }

    /// Takes the lock that delays shutdowns; dropping it lets them go on.
    ///
    /// # Errors
    /// When logind does not answer or refuses.
    pub fn inhibit(&mut self, who: &str, why: &str) -> Result<OwnedFd> {
        let body = Body::default().text("shutdown").text(who).text(why).text("delay");
        let lock = self.bus.call(LOGIND, "Inhibit", body)?.fds.pop();
        lock.ok_or_else(|| Error::new(Kind::System, "logind gave no lock"))
    }

    /// Waits for word of a shutdown: it is coming, or it was called off.
    ///
    /// # Errors
    /// When the bus is gone.
    pub fn announced(&mut self) -> Result<bool> {
        loop {
            let signal = self.bus.wait()?;
            if signal.member == SIGNAL {
                return Ok(signal.arguments().first().is_some_and(|coming| coming == "1"));
            }
        }
    }

    /// What ends [`Self::announced`] from elsewhere when it is shut down.
    ///
    /// # Errors
    /// When there are no descriptors left.
    pub fn closer(&self) -> Result<UnixStream> {
        self.bus.closer().context(|| "watch of logind".to_owned())
    }
}

#[cfg(test)]
mod tests {
    use std::{io::Read, os::unix::net::UnixListener, thread};

    use super::*;
    use crate::dbus::mock::Server;

    #[test]
    fn a_lock_is_held_until_the_shutdown_may_go_on() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("bus");
        let listener = UnixListener::bind(&path).unwrap();
        let server = thread::spawn(move || {
            let mut server = Server::accept(&listener);
            let (mut held, lock) = std::io::pipe().unwrap();
            let mut lock = Some(OwnedFd::from(lock));
            let mut calls = vec![];
            while let Some((serial, name, arguments)) = server.call() {
                let body = match name.as_str() {
                    "Get" => Body::default().big(5_000_000),
                    "Inhibit" => Body::default().first_descriptor(),
                    _ => Body::default().text(""),
                };
                let fd = lock.take_if(|_| name == "Inhibit");
                server.send(Ok(serial), &body, fd.as_ref());
                calls.push(format!("{name} {}", arguments.join(" ")));
                if name == "Inhibit" {
                    drop(fd);
                    server.send(Err("Another"), &Body::default().flag(true), None);
                    server.send(Err(SIGNAL), &Body::default().flag(true), None);
                    // The client lets go of its end.
                    held.read_to_end(&mut vec![]).unwrap();
                    server.send(Err(SIGNAL), &Body::default().flag(false), None);
                }
            }
            calls
        });
        let mut logind = Logind::connect(&path).unwrap();
        assert_eq!(logind.longest_delay().unwrap(), Duration::from_secs(5));
        logind.reload().unwrap();
        let lock = logind.inhibit("isopod", "pods end").unwrap();
        assert!(logind.announced().unwrap());
        drop(lock);
        assert!(!logind.announced().unwrap());
        let closer = logind.closer().unwrap();
        let waits = thread::spawn(move || logind.announced());
        closer.shutdown(std::net::Shutdown::Both).unwrap();
        assert!(waits.join().unwrap().is_err());
        let calls = server.join().unwrap();
        assert_eq!(calls[0], "Hello ");
        assert!(calls[1].starts_with("AddMatch type='signal',interface='org.freedesktop.login1.Manager'"), "{calls:?}");
        assert_eq!(calls[2], "Get org.freedesktop.login1.Manager InhibitDelayMaxUSec");
        assert_eq!(calls[3], "KillUnit systemd-logind.service all");
        assert_eq!(calls[4], "Inhibit shutdown isopod pods end delay");
    }
}
