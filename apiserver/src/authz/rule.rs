//! Policy rules: what one permits, and whether a set of rules covers another.

use serde_json::Value;

use super::Attributes;

/// One `PolicyRule`.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Rule {
    /// Verbs.
    pub verbs: Vec<String>,
    /// API groups.
    pub api_groups: Vec<String>,
    /// Resources, `*`, `pods/log` or `*/scale`.
    pub resources: Vec<String>,
    /// Names; empty is all.
    pub resource_names: Vec<String>,
    /// URL paths, for requests that are not for resources.
    pub non_resource_urls: Vec<String>,
}

fn strings(value: &Value) -> Vec<String> {
    value.as_array().into_iter().flatten().filter_map(Value::as_str).map(str::to_owned).collect()
}

fn has(list: &[String], wanted: &str) -> bool {
    list.iter().any(|item| item == "*" || item == wanted)
}

/// Whether a rule's resource matches `combined` (`pods` or `pods/log`).
fn resource_matches(rule: &str, combined: &str, subresource: &str) -> bool {
    rule == "*"
        || rule == combined
        || (!subresource.is_empty() && rule.strip_prefix("*/").is_some_and(|sub| sub == subresource))
}

fn path_matches(rule: &str, path: &str) -> bool {
    rule == "*" || rule == path || rule.strip_suffix('*').is_some_and(|prefix| path.starts_with(prefix))
}

impl Rule {
    /// Reads a rule from JSON.
    pub fn from_value(value: &Value) -> Self {
        Self {
            verbs: strings(&value["verbs"]),
            api_groups: strings(&value["apiGroups"]),
            resources: strings(&value["resources"]),
            resource_names: strings(&value["resourceNames"]),
            non_resource_urls: strings(&value["nonResourceURLs"]),
        }
    }

    /// Reads a list of rules; null is empty.
    pub fn list(value: &Value) -> Vec<Self> {
        value.as_array().into_iter().flatten().map(Self::from_value).collect()
    }

    /// The rule as JSON, without empty fields.
    pub fn to_value(&self) -> Value {
        let mut map = serde_json::Map::new();
        map.insert("verbs".into(), self.verbs.clone().into());
        for (name, list) in [
            ("apiGroups", &self.api_groups),
            ("resources", &self.resources),
            ("resourceNames", &self.resource_names),
            ("nonResourceURLs", &self.non_resource_urls),
        ] {
            if !list.is_empty() {
                map.insert(name.into(), list.clone().into());
            }
        }
        Value::Object(map)
    }

    /// Whether the rule permits the request.
    pub fn allows(&self, attributes: &Attributes) -> bool {
        if !has(&self.verbs, &attributes.verb) {
            return false;
        }
        if !attributes.resource_request {
            return self.non_resource_urls.iter().any(|rule| path_matches(rule, &attributes.path));
        }
        if !has(&self.api_groups, &attributes.group) {
            return false;
        }
        let joined;
        let combined = if attributes.subresource.is_empty() {
            &attributes.resource
        } else {
            joined = format!("{}/{}", attributes.resource, attributes.subresource);
            &joined
        };
        self.resources.iter().any(|rule| resource_matches(rule, combined, &attributes.subresource))
            && (self.resource_names.is_empty() || self.resource_names.contains(&attributes.name))
    }

    /// The rule as rules that each name one group, resource, verb and name, or one path and verb.
    pub fn breakdown(&self) -> Vec<Self> {
        let mut out = Vec::new();
        for group in &self.api_groups {
            for resource in &self.resources {
                for verb in &self.verbs {
                    let one = Self {
                        verbs: vec![verb.clone()],
                        api_groups: vec![group.clone()],
                        resources: vec![resource.clone()],
                        ..Self::default()
                    };
                    if self.resource_names.is_empty() {
                        out.push(one);
                        continue;
                    }
                    let named =
                        self.resource_names.iter().map(|n| Self { resource_names: vec![n.clone()], ..one.clone() });
                    out.extend(named);
                }
            }
        }
        for url in &self.non_resource_urls {
            for verb in &self.verbs {
                out.push(Self { verbs: vec![verb.clone()], non_resource_urls: vec![url.clone()], ..Self::default() });
            }
        }
        out
    }

    /// Whether this rule permits all that `sub`, a rule of a breakdown, does.
    fn covers(&self, sub: &Self) -> bool {
        let all = |ours: &[String], theirs: &[String]| {
            ours.iter().any(|item| item == "*") || theirs.iter().all(|item| ours.contains(item))
        };
        let resources = |theirs: &[String]| {
            theirs.iter().all(|resource| {
                let subresource = resource.split_once('/').map_or("", |(_, sub)| sub);
                self.resources.iter().any(|rule| resource_matches(rule, resource, subresource))
            })
        };
        let names = self.resource_names.is_empty()
            || (!sub.resource_names.is_empty() && sub.resource_names.iter().all(|n| self.resource_names.contains(n)));
        let urls =
            sub.non_resource_urls.iter().all(|url| self.non_resource_urls.iter().any(|rule| path_matches(rule, url)));
        all(&self.verbs, &sub.verbs)
            && all(&self.api_groups, &sub.api_groups)
            && resources(&sub.resources)
            && names
            && urls
    }

    /// Upstream's short text of a rule.
    pub fn compact(&self) -> String {
        let parts = [
            ("APIGroups", &self.api_groups),
            ("NonResourceURLs", &self.non_resource_urls),
            ("Resources", &self.resources),
            ("ResourceNames", &self.resource_names),
            ("Verbs", &self.verbs),
        ];
        let parts: Vec<String> = parts
            .iter()
            .filter(|(_, list)| !list.is_empty())
            .map(|(name, list)| format!("{name}:{}", quoted(list)))
            .collect();
        format!("{{{}}}", parts.join(", "))
    }
}

/// A list of strings as upstream's `%q` prints it.
pub(crate) fn quoted(list: &[String]) -> String {
    let items: Vec<String> = list.iter().map(|item| isopod_api::text::quote(item)).collect();
    format!("[{}]", items.join(" "))
}

/// What of `wanted` the rules `held` do not cover, broken down.
pub fn uncovered(held: &[Rule], wanted: &[Rule]) -> Vec<Rule> {
    wanted.iter().flat_map(Rule::breakdown).filter(|sub| !held.iter().any(|rule| rule.covers(sub))).collect()
}

/// Joins the verbs of broken-down rules for the same resource, and sorts.
pub fn compacted(rules: Vec<Rule>) -> Vec<Rule> {
    let mut out: Vec<Rule> = Vec::new();
    for rule in rules {
        let simple = rule.resource_names.is_empty() && rule.non_resource_urls.is_empty();
        let same = |other: &&mut Rule| {
            simple
                && other.resource_names.is_empty()
                && other.non_resource_urls.is_empty()
                && other.api_groups == rule.api_groups
                && other.resources == rule.resources
        };
        match out.iter_mut().find(same) {
            Some(other) => other.verbs.extend(rule.verbs.into_iter().filter(|_| true)),
            None => out.push(rule),
        }
    }
    for rule in &mut out {
        let mut seen = std::collections::HashSet::new();
        rule.verbs.retain(|verb| seen.insert(verb.clone()));
    }
    out.sort_by_key(Rule::compact);
    out
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn rules(value: Value) -> Vec<Rule> {
        Rule::list(&value)
    }

    fn request(verb: &str, group: &str, resource: &str, subresource: &str, name: &str) -> Attributes {
        Attributes {
            verb: verb.into(),
            resource_request: true,
            group: group.into(),
            resource: resource.into(),
            subresource: subresource.into(),
            name: name.into(),
            ..Attributes::default()
        }
    }

    #[test]
    fn what_a_rule_allows() {
        let rule = &rules(json!([{"verbs": ["get"], "apiGroups": [""], "resources": ["pods", "pods/log", "*/scale"],
            "resourceNames": ["a"]}]))[0];
        for (attributes, allowed) in [
            (request("get", "", "pods", "", "a"), true),
            (request("get", "", "pods", "", "b"), false),
            (request("list", "", "pods", "", "a"), false),
            (request("get", "apps", "pods", "", "a"), false),
            (request("get", "", "pods", "log", "a"), true),
            (request("get", "", "pods", "exec", "a"), false),
            (request("get", "", "anything", "scale", "a"), true),
        ] {
            assert_eq!(rule.allows(&attributes), allowed, "{attributes:?}");
        }
        let star = &rules(json!([{"verbs": ["*"], "apiGroups": ["*"], "resources": ["*"]}]))[0];
        assert!(star.allows(&request("delete", "x", "y", "z", "")));
        let path = |path: &str| Attributes { verb: "get".into(), path: path.into(), ..Attributes::default() };
        let urls = &rules(json!([{"verbs": ["get"], "nonResourceURLs": ["/api", "/api/*"]}]))[0];
        assert!(urls.allows(&path("/api")) && urls.allows(&path("/api/v1")));
        assert!(!urls.allows(&path("/apis")) && !star.allows(&path("/api")));
    }

    #[test]
    fn missing_rights_are_named_as_upstream_does() {
        let held = rules(json!([{"verbs": ["get"], "apiGroups": [""], "resources": ["configmaps"]}]));
        let wanted = rules(json!([
            {"verbs": ["get", "list"], "apiGroups": [""], "resources": ["configmaps", "pods"]},
            {"verbs": ["*"], "apiGroups": ["apps"], "resources": ["deployments"]},
        ]));
        let text: Vec<String> = compacted(uncovered(&held, &wanted)).iter().map(Rule::compact).collect();
        assert_eq!(
            text,
            [
                "{APIGroups:[\"\"], Resources:[\"configmaps\"], Verbs:[\"list\"]}",
                "{APIGroups:[\"\"], Resources:[\"pods\"], Verbs:[\"get\" \"list\"]}",
                "{APIGroups:[\"apps\"], Resources:[\"deployments\"], Verbs:[\"*\"]}",
            ]
        );
    }

    #[test]
    fn coverage_respects_names_stars_and_subresources() {
        let covered = |held: Value, wanted: Value| uncovered(&rules(held), &rules(wanted)).is_empty();
        let all = json!([{"verbs": ["*"], "apiGroups": ["*"], "resources": ["*"]}]);
        assert!(covered(all.clone(), json!([{"verbs": ["get"], "apiGroups": [""], "resources": ["pods/log"]}])));
        assert!(!covered(all, json!([{"verbs": ["get"], "nonResourceURLs": ["/x"]}])));
        let named = json!([{"verbs": ["get"], "apiGroups": [""], "resources": ["pods"], "resourceNames": ["a", "b"]}]);
        let one = json!([{"verbs": ["get"], "apiGroups": [""], "resources": ["pods"], "resourceNames": ["a"]}]);
        assert!(covered(named.clone(), one));
        assert!(!covered(named, json!([{"verbs": ["get"], "apiGroups": [""], "resources": ["pods"]}])));
        let scale = json!([{"verbs": ["get"], "apiGroups": [""], "resources": ["*/scale"]}]);
        assert!(covered(scale, json!([{"verbs": ["get"], "apiGroups": [""], "resources": ["x/scale"]}])));
        // A user who may get deployments by verb list does not hold the verb star.
        let get = json!([{"verbs": ["get"], "apiGroups": ["apps"], "resources": ["deployments"]}]);
        assert!(!covered(get, json!([{"verbs": ["*"], "apiGroups": ["apps"], "resources": ["deployments"]}])));
    }
}
