//! Slices of systemd's, for a caller that groups pods by them.

use oci_spec::runtime::LinuxResources;

use super::systemd::{connect, limits, set_limits, start_unit, stop_and_wait};
use crate::{dbus::Value, error::Result};

/// Makes a slice (`a-b.slice` lies in `a.slice`) with limits; one that exists gets them.
///
/// # Errors
/// When systemd does not answer or refuses.
pub fn make(unit: &str, resources: &LinuxResources) -> Result<()> {
    let limits = limits(Some(resources))?;
    let mut properties =
        vec![("Description", Value::Text(format!("isopod pods {unit}"))), ("DefaultDependencies", Value::Flag(false))];
    properties.extend(limits.iter().map(|(name, value)| (*name, value.clone())));
    match start_unit(&mut connect()?, unit, &properties) {
        Err(e) if e.to_string().contains(".UnitExists") => set_limits(unit, &limits),
        other => other,
    }
}

/// Changes a slice's limits.
///
/// # Errors
/// When systemd does not answer, does not know it or refuses.
pub fn limit(unit: &str, resources: &LinuxResources) -> Result<()> {
    set_limits(unit, &limits(Some(resources))?)
}

/// Stops a slice and with it all that is in it. One that is gone is fine.
///
/// # Errors
/// When systemd does not answer or refuses.
pub fn stop(unit: &str) -> Result<()> {
    stop_and_wait(unit)
}
