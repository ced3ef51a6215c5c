//! Reading the kernel's maps back: whether they hold what they should, and making them so.
//!
//! A map is compared by a sum over its elements first: of many maps with many elements only those that differ are ever
//! held in memory. The kernel walks a map from its beginning for each lot of elements that it tells, so that reading a
//! large one takes long: whoever knows which maps were touched has only those read.

use std::collections::HashMap;

use super::{
    element::{Element, ElementKey, Family, Map, Value},
    kernel::{Error, Kernel, Wanted},
    wire::{self, Data, Raw},
};
use crate::monitor::Heard;

/// How much a verification had to change.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Difference {
    pub(crate) removed: usize,
    pub(crate) added: usize,
}

/// What a map holds, in whatever order: how many elements, and the sum of their fingerprints.
#[derive(Clone, Copy, Default, PartialEq, Eq, Debug)]
struct Tally {
    count: usize,
    sum: u64,
}

impl Tally {
    fn add(&mut self, key: &[u8], end: Option<&[u8]>, data: Data<'_>) {
        let (kind, value) = match data {
            Data::None => (0, &[][..]),
            Data::Value(value) => (1, value),
            Data::Goto(chain) => (2, chain.as_bytes()),
            Data::Verdict => (3, &[][..]),
        };
        self.count += 1;
        let parts = [key, end.unwrap_or_default(), value];
        self.sum = self.sum.wrapping_add(parts.into_iter().fold(kind, mix));
    }

    fn add_element(&mut self, element: &Element) {
        let key = element.key.bytes();
        match &element.value {
            Value::Member => self.add(key, None, Data::None),
            Value::Until(end) => self.add(key, Some(end.bytes()), Data::None),
            Value::Backend(to) => self.add(key, None, Data::Value(to.bytes())),
            Value::Goto(chain) if element.map.is_numbered() => {
                self.add(key, None, Data::Value(&chain.number().to_ne_bytes()));
            }
            Value::Goto(chain) => self.add(key, None, Data::Goto(&chain.to_string())),
            Value::Foreign => self.add(key, None, Data::Verdict),
        }
    }
}

/// Continues a fingerprint. It tells mistakes, not malice: who may edit our table may do anything.
fn mix(mut hash: u64, bytes: &[u8]) -> u64 {
    let mut step = |word: u64| {
        hash = (hash ^ word).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        hash ^= hash >> 29;
    };
    let (words, rest) = bytes.as_chunks::<4>();
    words.iter().for_each(|word| step(u32::from_ne_bytes(*word).into()));
    rest.iter().for_each(|byte| step((*byte).into()));
    step(bytes.len() as u64);
    hash
}

/// Something about each map of each family.
struct ByMap<T>([Vec<T>; Family::ALL.len()]);

impl<T: Clone> ByMap<T> {
    fn new(value: T) -> Self {
        Self(Family::ALL.map(|_| vec![value.clone(); Map::ALL.len()]))
    }

    fn of(&mut self, family: Family, map: Map) -> &mut T {
        &mut self.0[family.index()][map as usize]
    }
}

/// The maps to be corrected.
pub(crate) struct Suspects(ByMap<bool>);

impl Suspects {
    fn is_empty(&self) -> bool {
        !self.0.0.iter().flatten().any(|suspect| *suspect)
    }

    pub(super) fn has(&self, family: Family, map: Map) -> bool {
        self.0.0[family.index()][map as usize]
    }
}

impl Kernel {
    /// Compares the rules, and the maps that were heard of, with what they should be, and repairs them.
    pub(crate) fn verify(&mut self, heard: &Heard, wanted: &Wanted<'_>) -> Result<Difference, Error> {
        if self.rules_digest()? == self.digest {
            return self.correct(heard, wanted);
        }
        tracing::warn!(table = self.settings.table, "somebody changed our nftables rules: loading them again");
        let existing = self.all_chains()?;
        if existing.iter().any(Vec::is_empty) {
            return self.reconcile(wanted);
        }
        self.load_rules(&existing, wanted)?;
        self.correct(heard, wanted)
    }

    pub(super) fn correct(&mut self, heard: &Heard, wanted: &Wanted<'_>) -> Result<Difference, Error> {
        let (suspects, mut present) = self.suspects(heard, wanted)?;
        if suspects.is_empty() {
            return Ok(Difference { removed: 0, added: 0 });
        }
        if present.is_empty() {
            let added = self.quietly(|kernel| kernel.load(&suspects, wanted))?;
            return Ok(Difference { removed: 0, added });
        }
        let (mut removed, mut added) = (Vec::new(), Vec::new());
        self.with_entries(wanted, &mut |element| {
            if !suspects.has(element.family, element.map) {
                return;
            }
            match present.remove(&element.id()) {
                Some(same) if same == element => {}
                before => {
                    removed.extend(before);
                    added.push(element);
                }
            }
        });
        removed.extend(present.into_values());
        let difference = Difference { removed: removed.len(), added: added.len() };
        self.change(&removed, &added)?;
        Ok(difference)
    }

    /// The maps, of those heard of, that are not as they should be, and what is in them.
    fn suspects(&self, heard: &Heard, wanted: &Wanted<'_>) -> Result<(Suspects, HashMap<ElementKey, Element>), Error> {
        let all = || self.families.iter().flat_map(|f| Map::ALL.iter().map(move |m| (*f, *m)));
        let (mut suspects, mut have, mut filled) = (ByMap::new(false), ByMap::new(Tally::default()), false);
        for (family, map) in all().filter(|(_, map)| heard.is_about(*map)) {
            let tally = have.of(family, map);
            *suspects.of(family, map) = true;
            *tally = self.tally(family, map)?;
            filled |= tally.count > 0;
        }
        let mut present = HashMap::new();
        if filled {
            let mut want = ByMap::new(Tally::default());
            self.with_entries(wanted, &mut |e| want.of(e.family, e.map).add_element(&e));
            for (family, map) in all() {
                let suspect = suspects.of(family, map);
                *suspect &= have.of(family, map) != want.of(family, map);
                if *suspect && have.of(family, map).count > 0 {
                    self.dump_into(family, map, &mut present)?;
                }
            }
        }
        Ok((Suspects(suspects), present))
    }

    fn tally(&self, family: Family, map: Map) -> Result<Tally, Error> {
        let request = wire::dump_elements(&self.settings.table, map.name(), family);
        self.read_consistent(&request, |tally: &mut Tally, message| {
            wire::raw_elements(message.body).for_each(|Raw { key, end, data }| tally.add(key, end, data));
        })
    }

    fn dump_into(&self, family: Family, map: Map, all: &mut HashMap<ElementKey, Element>) -> Result<(), Error> {
        let request = wire::dump_elements(&self.settings.table, map.name(), family);
        let elements: Vec<Element> = self.read_consistent(&request, |list: &mut Vec<_>, message| {
            list.extend(wire::elements(family, map, message.body));
        })?;
        all.extend(elements.into_iter().map(|e| (e.id(), e)));
        Ok(())
    }

    /// Every element the model is in charge of.
    #[cfg(test)]
    pub(crate) fn dump(&self) -> Result<HashMap<ElementKey, Element>, Error> {
        let mut all = HashMap::new();
        for family in &self.families {
            Map::ALL.iter().try_for_each(|map| self.dump_into(*family, *map, &mut all))?;
        }
        Ok(all)
    }
}
