//! IP addresses and CIDRs.

use std::net::{IpAddr, Ipv4Addr};

use isopod_api::field::Path;

use super::{At, Errs};

const NOT_AN_IP: &str = "must be a valid IP address, (e.g. 10.9.8.7 or 2001:db8::ffff)";
const NOT_A_CIDR: &str = "must be a valid CIDR value, (e.g. 10.9.8.0/24 or 2001:db8::/64)";

/// Parses an address; leading zeros in IPv4 octets are told apart.
pub(crate) fn parse_ip(s: &str) -> Result<IpAddr, &'static str> {
    if let Ok(ip) = s.parse() {
        return Ok(ip);
    }
    let octets: Vec<&str> = s.split('.').collect();
    let numeric = octets.len() == 4 && octets.iter().all(|o| o.parse::<u8>().is_ok());
    Err(if numeric { "must not have leading 0s" } else { NOT_AN_IP })
}

/// Messages for an address in new fields: canonical form, no IPv4-mapped IPv6.
pub(crate) fn ip_messages(s: &str) -> Vec<String> {
    match parse_ip(s) {
        Err(message) => vec![message.to_owned()],
        Ok(IpAddr::V6(v6)) if v6.to_ipv4_mapped().is_some() => {
            vec!["must not be an IPv4-mapped IPv6 address".to_owned()]
        }
        Ok(_) => Vec::new(),
    }
}

/// Messages for the name of an IPAddress object.
pub(crate) fn canonical_ip_messages(s: &str) -> Vec<String> {
    let messages = ip_messages(s);
    match s.parse::<IpAddr>() {
        _ if !messages.is_empty() => messages,
        Ok(ip) if ip.to_string() != s => vec![format!("must be in canonical form (\"{ip}\")")],
        _ => Vec::new(),
    }
}

/// An IP address.
pub(crate) fn ip(e: &mut Errs, at: &At<'_>) -> bool {
    let messages = ip_messages(at.s());
    let ok = messages.is_empty();
    e.messages(at, messages);
    ok
}

/// A parsed CIDR: address as written and prefix length.
pub(crate) fn parse_cidr(s: &str) -> Option<(IpAddr, u8)> {
    let (address, prefix) = s.split_once('/')?;
    let address: IpAddr = address.parse().ok()?;
    if prefix.len() > 1 && prefix.starts_with('0') {
        return None;
    }
    let prefix: u8 = prefix.parse().ok()?;
    (prefix <= if address.is_ipv4() { 32 } else { 128 }).then_some((address, prefix))
}

/// What is wrong with a CIDR of a field that takes any spelling of it.
pub(crate) fn cidr_messages(s: &str) -> Vec<String> {
    let Some((address, prefix)) = parse_cidr(s) else {
        let sloppy = s.split_once('/').is_some_and(|(address, prefix)| {
            parse_ip(address) != Err(NOT_AN_IP)
                && prefix.bytes().all(|b| b.is_ascii_digit())
                && prefix.parse::<u8>().is_ok_and(|n| n <= if address.contains(':') { 128 } else { 32 })
        });
        let message = if sloppy { "must not have leading 0s in IP or prefix length" } else { NOT_A_CIDR };
        return vec![message.to_owned()];
    };
    if matches!(address, IpAddr::V6(v6) if v6.to_ipv4_mapped().is_some()) {
        return vec!["must not have an IPv4-mapped IPv6 address".to_owned()];
    }
    match ipnet::IpNet::new(address, prefix) {
        Ok(net) if net.trunc().addr() != address => vec!["must not have bits set beyond the prefix length".to_owned()],
        _ => Vec::new(),
    }
}

/// A CIDR.
pub(crate) fn cidr(e: &mut Errs, at: &At<'_>) -> bool {
    let messages = cidr_messages(at.s());
    let ok = messages.is_empty();
    e.messages(at, messages);
    ok
}

/// A CIDR in its canonical form.
pub(crate) fn canonical_cidr(e: &mut Errs, at: &At<'_>) {
    if !cidr(e, at) {
        return;
    }
    if let Ok(net) = at.s().parse::<ipnet::IpNet>()
        && net.to_string() != at.s()
    {
        e.invalid_str(at, &format!("must be in canonical form (\"{net}\")"));
    }
}

/// The warning about an address that is not written as it should be.
pub(crate) fn ip_warning(path: &Path, value: &str) -> Option<String> {
    let plain = |octets: &str| octets.split('.').map(|o| o.parse::<u8>().ok()).collect::<Option<Vec<u8>>>();
    let better = match parse_ip(value) {
        Ok(IpAddr::V6(v6)) => match v6.to_ipv4_mapped() {
            Some(v4) => v4.to_string(),
            None if v6.to_string() == value => return None,
            None => {
                return Some(format!(
                    "{path}: IPv6 address \"{value}\" should be in RFC 5952 canonical format (\"{v6}\")"
                ));
            }
        },
        Ok(IpAddr::V4(_)) | Err(NOT_AN_IP) => return None,
        Err(_) => plain(value)?.iter().map(u8::to_string).collect::<Vec<_>>().join("."),
    };
    Some(format!(
        "{path}: non-standard IP address \"{value}\" will be considered invalid in a future Kubernetes release: use \"{better}\""
    ))
}

/// The warning about a CIDR that is not written as it should be.
pub(crate) fn cidr_warning(path: &Path, value: &str) -> Option<String> {
    let net: ipnet::IpNet = value.parse().ok()?;
    if net.trunc() != net {
        let whole = ipnet::IpNet::from(net.addr());
        let masked = net.trunc();
        return Some(format!(
            "{path}: CIDR value \"{value}\" is ambiguous in this context (should be \"{masked}\" or \"{whole}\"?)"
        ));
    }
    (net.addr().is_ipv6() && net.to_string() != value)
        .then(|| format!("{path}: IPv6 CIDR value \"{value}\" should be in RFC 5952 canonical format (\"{net}\")"))
}

/// An address that other machines may use: not unspecified, loopback, link-local or multicast of link scope.
pub(crate) fn non_special_ip(e: &mut Errs, at: &At<'_>) {
    // Leading zeros do not matter here.
    let octets: Vec<&str> = at.s().split('.').map(|octet| octet.trim_start_matches('0')).collect();
    let plain = octets.iter().map(|octet| if octet.is_empty() { "0" } else { octet }).collect::<Vec<_>>().join(".");
    let Ok(ip) = parse_ip(at.s()).or_else(|_| plain.parse::<IpAddr>()) else {
        return e.invalid_str(at, "must be a valid IP address");
    };
    let link_local = match ip {
        IpAddr::V4(v4) => v4.is_link_local(),
        IpAddr::V6(v6) => v6.segments()[0] & 0xffc0 == 0xfe80,
    };
    let link_multicast = match ip {
        IpAddr::V4(v4) => v4.octets()[..3] == Ipv4Addr::new(224, 0, 0, 0).octets()[..3],
        IpAddr::V6(v6) => v6.segments()[0] & 0xff0f == 0xff02,
    };
    if ip.is_unspecified() {
        e.invalid_str(at, &format!("may not be unspecified ({})", at.s()));
    }
    if ip.is_loopback() {
        e.invalid_str(at, "may not be in the loopback range (127.0.0.0/8, ::1/128)");
    }
    if link_local {
        e.invalid_str(at, "may not be in the link-local range (169.254.0.0/16, fe80::/10)");
    }
    if link_multicast {
        e.invalid_str(at, "may not be in the link-local multicast range (224.0.0.0/24, ff02::/10)");
    }
}

/// `example.com/signer-name`.
pub(crate) fn signer_name(e: &mut Errs, at: &At<'_>) {
    if at.s().is_empty() {
        return e.required(at, "");
    }
    let parts: Vec<&str> = at.s().split('/').collect();
    let [domain, name] = parts[..] else {
        return e.invalid(at, "must be a fully qualified domain and path of the form 'example.com/signer-name'");
    };
    if domain.len() > 253 {
        e.too_long(at, 253);
    }
    first_bad_part(e, at, domain, isopod_api::names::dns1123_label);
    if !domain.contains('.') {
        e.invalid_as(at, domain, "should be a domain with at least two segments separated by dots");
    }
    first_bad_part(e, at, name, isopod_api::names::dns1123_subdomain);
    if at.s().len() > 571 {
        e.too_long(at, 571);
    }
}

/// The errors of the first dotted part that has some.
fn first_bad_part(e: &mut Errs, at: &At<'_>, whole: &str, check: fn(&str) -> Vec<String>) {
    let bad = whole.split('.').map(|part| (part, check(part))).find(|(_, messages)| !messages.is_empty());
    for (part, message) in bad.iter().flat_map(|(part, messages)| messages.iter().map(move |m| (part, m))) {
        e.invalid_as(at, whole, &format!("validating label {part:?}: {message}"));
    }
}

/// `IPv4` or `IPv6`.
pub(crate) fn family(ip: &str) -> &'static str {
    if ip.contains(':') { "IPv6" } else { "IPv4" }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn addresses() {
        assert_eq!(ip_messages("01.2.3.4"), ["must not have leading 0s"]);
        assert_eq!(ip_messages("x"), [NOT_AN_IP]);
        assert!(ip_messages("2001:db8::1").is_empty());
        assert_eq!(canonical_ip_messages("2001:DB8::1").len(), 1);
    }

    #[test]
    fn special_addresses() {
        for (ip, errors) in
            [("127.0.0.1", 1), ("169.254.1.1", 1), ("0.0.0.0", 1), ("224.0.0.5", 1), ("10.0.0.1", 0), ("fe80::1", 1)]
        {
            let obj = json!({"ip": ip});
            let mut e = Errs::new();
            non_special_ip(&mut e, &At::field(&obj, "ip"));
            assert_eq!(e.0.len(), errors, "{ip}");
        }
    }

    #[test]
    fn cidrs() {
        assert!(parse_cidr("10.0.0.0/24").is_some());
        assert!(parse_cidr("10.0.0.0/33").is_none());
        assert!(parse_cidr("10.0.0.0/08").is_none());
        for (cidr, message) in [
            ("10.0.0.0/8", ""),
            ("x", NOT_A_CIDR),
            ("10.0.0.0/33", NOT_A_CIDR),
            ("10.0.0.0/08", "must not have leading 0s in IP or prefix length"),
            ("010.0.0.0/8", "must not have leading 0s in IP or prefix length"),
            ("::ffff:10.0.0.0/104", "must not have an IPv4-mapped IPv6 address"),
            ("10.0.0.1/8", "must not have bits set beyond the prefix length"),
        ] {
            assert_eq!(cidr_messages(cidr).join("; "), message, "{cidr}");
        }
    }

    #[test]
    fn spellings_that_are_warned_of() {
        let path = Path::new("f");
        for (ip, warning) in [
            ("10.0.0.1", None),
            ("2001:db8::1", None),
            (
                "2001:DB8::1",
                Some("f: IPv6 address \"2001:DB8::1\" should be in RFC 5952 canonical format (\"2001:db8::1\")"),
            ),
            (
                "10.0.0.01",
                Some(
                    "f: non-standard IP address \"10.0.0.01\" will be considered invalid in a future Kubernetes release: use \"10.0.0.1\"",
                ),
            ),
        ] {
            assert_eq!(ip_warning(&path, ip).as_deref(), warning);
        }
        let ambiguous =
            "f: CIDR value \"10.0.0.1/8\" is ambiguous in this context (should be \"10.0.0.0/8\" or \"10.0.0.1/32\"?)";
        assert_eq!(cidr_warning(&path, "10.0.0.1/8").as_deref(), Some(ambiguous));
        assert_eq!(cidr_warning(&path, "10.0.0.0/8"), None);
    }
}
