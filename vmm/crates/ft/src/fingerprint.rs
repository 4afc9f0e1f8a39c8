//! What a pair must have in common to replay one another: CPU, engine, quirks, CPUID table, patch
//! set, memory, TAP features, kernel hash, versions, as names and values.

use serde::{Deserialize, Serialize};

/// The most properties in a fingerprint.
pub const MAX_PROPERTIES: usize = 64;
/// The longest name or value, in bytes.
pub const MAX_PROPERTY_LEN: usize = 256;

/// Properties of a host that must be equal on both, sorted by name.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(try_from = "Vec<(String, String)>", into = "Vec<(String, String)>")]
pub struct Fingerprint(Vec<(String, String)>);

/// A property that two hosts do not share.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Difference {
    /// Its name.
    pub name: String,
    /// The primary's value, where it has one.
    pub primary: Option<String>,
    /// The standby's value, where it has one.
    pub standby: Option<String>,
}

impl TryFrom<Vec<(String, String)>> for Fingerprint {
    type Error = &'static str;

    fn try_from(mut properties: Vec<(String, String)>) -> Result<Self, &'static str> {
        let long = |text: &String| text.len() > MAX_PROPERTY_LEN;
        if properties.len() > MAX_PROPERTIES
            || properties
                .iter()
                .any(|(name, value)| long(name) || long(value))
        {
            return Err("fingerprint: over its limits");
        }
        properties.sort();
        if properties.windows(2).any(|pair| pair[0].0 == pair[1].0) {
            return Err("fingerprint: a property twice");
        }
        Ok(Self(properties))
    }
}

impl From<Fingerprint> for Vec<(String, String)> {
    fn from(fingerprint: Fingerprint) -> Self {
        fingerprint.0
    }
}

impl Fingerprint {
    /// What differs between this one, the primary's, and `standby`'s; empty when they match.
    #[must_use]
    pub fn differences(&self, standby: &Self) -> Vec<Difference> {
        let value = |of: &Self, name: &str| {
            let found = of.0.iter().find(|(other, _)| other == name);
            found.map(|(_, value)| value.clone())
        };
        let names = self.0.iter().chain(&standby.0).map(|(name, _)| name);
        let mut differences: Vec<Difference> = names
            .map(|name| Difference {
                name: name.clone(),
                primary: value(self, name),
                standby: value(standby, name),
            })
            .filter(|difference| difference.primary != difference.standby)
            .collect();
        differences.sort_by(|a, b| a.name.cmp(&b.name));
        differences.dedup();
        differences
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(properties: &[(&str, &str)]) -> Fingerprint {
        let owned = properties
            .iter()
            .map(|(n, v)| (n.to_string(), v.to_string()));
        Fingerprint::try_from(owned.collect::<Vec<_>>()).unwrap()
    }

    #[test]
    fn differences_name_the_property_and_both_values() {
        let primary = of(&[("cpu", "a"), ("memory", "128"), ("patches", "7")]);
        let standby = of(&[("memory", "256"), ("cpu", "a"), ("tap", "x")]);
        assert_eq!(primary.differences(&primary), vec![]);
        let found = primary.differences(&standby);
        let names: Vec<_> = found.iter().map(|d| d.name.as_str()).collect();
        assert_eq!(names, ["memory", "patches", "tap"]);
        assert_eq!(found[0].primary.as_deref(), Some("128"));
        assert_eq!(found[0].standby.as_deref(), Some("256"));
        assert_eq!(found[2].primary, None);
    }

    #[test]
    fn a_fingerprint_over_its_limits_or_with_a_name_twice_is_refused() {
        let many: Vec<_> = (0..65).map(|n| (n.to_string(), String::new())).collect();
        assert!(Fingerprint::try_from(many).is_err());
        let twice = vec![
            ("a".to_owned(), "1".to_owned()),
            ("a".to_owned(), "2".to_owned()),
        ];
        assert!(Fingerprint::try_from(twice).is_err());
    }
}
