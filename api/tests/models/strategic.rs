//! Strategic merge patches against what each directive says it does.
//!
//! Document and patch are drawn in a form of their own, in which lists are maps by merge key, and the expectation is worked
//! out there. Orders are checked apart: what a patch names stands in its order, the rest keeps its own.

use std::collections::BTreeMap;

use isopod_api::{gvk::Gvk, patch::strategic_merge, schema::lookup};
use proptest::prelude::*;
use serde_json::{Map, Value, json};

type Words = BTreeMap<String, String>;
/// Image, args and env of a container.
type Summary = (Option<String>, Option<Vec<String>>, Words);

/// Names in some order, without repetition.
fn names(of: &'static [&'static str]) -> impl Strategy<Value = Vec<String>> {
    prop::sample::subsequence(of, 0..=of.len())
        .prop_shuffle()
        .prop_map(|all| all.into_iter().map(str::to_owned).collect())
}

fn word() -> impl Strategy<Value = String> {
    prop::sample::select(vec!["0", "1", "2"]).prop_map(str::to_owned)
}

/// A container of the document.
#[derive(Debug, Clone)]
struct Container {
    image: Option<String>,
    args: Option<Vec<String>>,
    env: Vec<(String, String)>,
}

/// The parts of a pod that the patches change.
#[derive(Debug, Clone)]
struct Doc {
    containers: Vec<(String, Container)>,
    /// A plain map.
    selector: Option<Words>,
    /// A list of scalars that merges.
    finalizers: Option<Vec<String>>,
    /// A list of objects that does not merge.
    tolerations: Option<Vec<String>>,
    /// By name; the member is the source of the volume.
    volumes: BTreeMap<String, String>,
}

fn env() -> impl Strategy<Value = Vec<(String, String)>> {
    (names(&["E", "F", "G"]), prop::collection::vec(word(), 3))
        .prop_map(|(names, words)| names.into_iter().zip(words).collect())
}

fn doc() -> impl Strategy<Value = Doc> {
    let args = prop::option::of(prop::collection::vec(word(), 1..3));
    let container =
        (prop::option::of(word()), args, env()).prop_map(|(image, args, env)| Container { image, args, env });
    let containers = (names(&["a", "b", "c", "d"]), prop::collection::vec(container, 4));
    (
        containers.prop_map(|(names, all)| names.into_iter().zip(all).collect()),
        prop::option::of(prop::collection::btree_map("[x-z]", word(), 1..3)),
        prop::option::of(names(&["f/1", "f/2", "f/3", "f/4"]).prop_filter("some", |all| !all.is_empty())),
        prop::option::of(prop::collection::vec(word(), 1..3)),
        prop::collection::btree_map("[vw]", source(), 0..3),
    )
        .prop_map(|(containers, selector, finalizers, tolerations, volumes)| Doc {
            containers,
            selector,
            finalizers,
            tolerations,
            volumes,
        })
}

fn source() -> impl Strategy<Value = String> {
    prop::sample::select(vec!["emptyDir", "configMap", "secret"]).prop_map(str::to_owned)
}

fn env_list(env: &[(String, String)]) -> Value {
    env.iter().map(|(name, value)| json!({"name": name, "value": value})).collect()
}

fn toleration(key: &String) -> Value {
    json!({"key": key})
}

impl Doc {
    fn value(&self) -> Value {
        let mut spec = Map::new();
        let item = |(name, container): &(String, Container)| {
            let mut item = Map::from_iter([("name".to_owned(), json!(name))]);
            item.extend(container.image.as_ref().map(|image| ("image".to_owned(), json!(image))));
            item.extend(container.args.as_ref().map(|args| ("args".to_owned(), json!(args))));
            if !container.env.is_empty() {
                item.insert("env".into(), env_list(&container.env));
            }
            Value::Object(item)
        };
        spec.insert("containers".into(), self.containers.iter().map(item).collect());
        spec.extend(self.selector.as_ref().map(|words| ("nodeSelector".to_owned(), json!(words))));
        let tolerations = self.tolerations.as_ref().map(|keys| keys.iter().map(toleration).collect());
        spec.extend(tolerations.map(|list| ("tolerations".to_owned(), list)));
        let volume = |(name, source): (&String, &String)| json!({"name": name, source.as_str(): {}});
        spec.insert("volumes".into(), self.volumes.iter().map(volume).collect());
        let mut metadata = Map::from_iter([("name".to_owned(), json!("p"))]);
        metadata.extend(self.finalizers.as_ref().map(|all| ("finalizers".to_owned(), json!(all))));
        json!({"metadata": metadata, "spec": spec})
    }
}

/// What a patch does to one field that has a value.
#[derive(Debug, Clone)]
enum Field<T> {
    Leave,
    Set(T),
    Remove,
}

fn field<T: std::fmt::Debug + Clone>(of: impl Strategy<Value = T>) -> impl Strategy<Value = Field<T>> {
    prop::option::of(prop::option::of(of)).prop_map(|drawn| match drawn {
        None => Field::Leave,
        Some(None) => Field::Remove,
        Some(Some(value)) => Field::Set(value),
    })
}

impl<T: Clone> Field<T> {
    fn on(&self, old: Option<T>) -> Option<T> {
        match self {
            Self::Leave => old,
            Self::Set(value) => Some(value.clone()),
            Self::Remove => None,
        }
    }

    fn write(&self, name: &str, into: &mut Map<String, Value>, show: impl Fn(&T) -> Value) {
        match self {
            Self::Leave => {}
            Self::Set(value) => drop(into.insert(name.to_owned(), show(value))),
            Self::Remove => drop(into.insert(name.to_owned(), Value::Null)),
        }
    }
}

/// What a patch does to a container.
#[derive(Debug, Clone)]
enum Item {
    Delete,
    Merge { image: Field<String>, args: Field<Vec<String>>, env: Vec<(String, Option<String>)> },
}

impl Item {
    /// What replaces a list is taken as it is: there is nothing in it to remove.
    fn say_nothing_of_the_old(&mut self) {
        if let Self::Merge { image, args, env } = self {
            if matches!(image, Field::Remove) {
                *image = Field::Leave;
            }
            if matches!(args, Field::Remove) {
                *args = Field::Leave;
            }
            env.retain(|(_, value)| value.is_some());
        }
    }
}

/// What a patch does to a plain map.
#[derive(Debug, Clone)]
enum Selector {
    Leave,
    Merge(BTreeMap<String, Option<String>>),
    Replace(Words),
    Delete,
}

#[derive(Debug, Clone)]
struct Patch {
    containers: Vec<(String, Item)>,
    /// `$patch: replace` in the list of containers.
    replace: bool,
    /// `$setElementOrder/containers`, with the patch's own first.
    order: Option<Vec<String>>,
    selector: Selector,
    finalizers: Vec<String>,
    /// `$deleteFromPrimitiveList/finalizers`.
    unwanted: Vec<String>,
    tolerations: Field<Vec<String>>,
    /// Volumes with `$retainKeys`: only the name and the new source stay.
    volumes: BTreeMap<String, String>,
}

fn patch() -> impl Strategy<Value = Patch> {
    let args = field(prop::collection::vec(word(), 1..3));
    let env = (names(&["E", "F", "G", "H"]), prop::collection::vec(prop::option::of(word()), 4));
    let env = env.prop_map(|(names, values)| names.into_iter().zip(values).collect());
    let item = prop_oneof![
        1 => Just(Item::Delete),
        4 => (field(word()), args, env).prop_map(|(image, args, env)| Item::Merge { image, args, env }),
    ];
    let containers = (names(&["a", "b", "c", "d", "e"]), prop::collection::vec(item, 5));
    let selector = prop_oneof![
        Just(Selector::Leave),
        prop::collection::btree_map("[x-z]", prop::option::of(word()), 1..3).prop_map(Selector::Merge),
        prop::collection::btree_map("[x-z]", word(), 0..3).prop_map(Selector::Replace),
        Just(Selector::Delete),
    ];
    (
        containers.prop_map(|(names, items)| names.into_iter().zip(items).collect::<Vec<_>>()),
        prop::bool::weighted(0.2),
        any::<bool>(),
        names(&["a", "b", "c", "d"]),
        selector,
        names(&["f/1", "f/2", "f/5"]),
        names(&["f/1", "f/3", "f/9"]),
        field(prop::collection::vec(word(), 1..3)),
        prop::collection::btree_map("[v-x]", source(), 0..3),
    )
        .prop_map(
            |(mut containers, replace, ordered, more, selector, finalizers, unwanted, tolerations, volumes)| {
                if replace {
                    containers.iter_mut().for_each(|(_, item)| item.say_nothing_of_the_old());
                }
                let own: Vec<String> = kept(&containers).map(|(name, _)| name.clone()).collect();
                // The patch's own have to come in the patch's order; others may stand anywhere, here behind.
                let others =
                    more.into_iter().filter(|name| !own.contains(name) && containers.iter().all(|(n, _)| n != name));
                let order = (ordered && !replace).then(|| own.iter().cloned().chain(others).collect());
                let unwanted = unwanted.into_iter().filter(|name| !finalizers.contains(name)).collect();
                Patch { containers, replace, order, selector, finalizers, unwanted, tolerations, volumes }
            },
        )
}

fn kept(containers: &[(String, Item)]) -> impl Iterator<Item = &(String, Item)> {
    containers.iter().filter(|(_, item)| !matches!(item, Item::Delete))
}

impl Patch {
    fn value(&self) -> Value {
        let mut spec = Map::new();
        let item = |(name, item): &(String, Item)| match item {
            Item::Delete => json!({"name": name, "$patch": "delete"}),
            Item::Merge { image, args, env } => {
                let mut out = Map::from_iter([("name".to_owned(), json!(name))]);
                image.write("image", &mut out, |image| json!(image));
                args.write("args", &mut out, |args| json!(args));
                let env = env.iter().map(|(name, value)| match value {
                    Some(value) => json!({"name": name, "value": value}),
                    None => json!({"name": name, "$patch": "delete"}),
                });
                out.insert("env".into(), env.collect());
                out.into()
            }
        };
        let mut items: Vec<Value> = self.containers.iter().map(item).collect();
        if self.replace {
            items.insert(0, json!({"$patch": "replace"}));
        }
        spec.insert("containers".into(), items.into());
        if let Some(order) = &self.order {
            let keys = order.iter().map(|name| json!({"name": name})).collect();
            spec.insert("$setElementOrder/containers".into(), keys);
        }
        let selector = match &self.selector {
            Selector::Leave => None,
            Selector::Merge(words) => Some(json!(words)),
            Selector::Delete => Some(json!({"$patch": "delete"})),
            Selector::Replace(words) => {
                let mut out = json!(words);
                out["$patch"] = "replace".into();
                Some(out)
            }
        };
        spec.extend(selector.map(|selector| ("nodeSelector".to_owned(), selector)));
        self.tolerations.write("tolerations", &mut spec, |keys| keys.iter().map(toleration).collect());
        let volume = |(name, source): (&String, &String)| json!({"name": name, "$retainKeys": ["name", source], source.as_str(): {}});
        spec.insert("volumes".into(), self.volumes.iter().map(volume).collect());
        let mut metadata = Map::from_iter([("finalizers".to_owned(), json!(self.finalizers))]);
        metadata.insert("$deleteFromPrimitiveList/finalizers".into(), json!(self.unwanted));
        json!({"metadata": metadata, "spec": spec})
    }

    /// The containers by name, with their env by name.
    fn containers_of(&self, doc: &Doc) -> BTreeMap<String, Summary> {
        let as_map = |c: &Container| (c.image.clone(), c.args.clone(), c.env.iter().cloned().collect::<Words>());
        let mut out: BTreeMap<String, _> = BTreeMap::new();
        if !self.replace {
            out.extend(doc.containers.iter().map(|(name, c)| (name.clone(), as_map(c))));
        }
        for (name, item) in &self.containers {
            match item {
                Item::Delete => drop(out.remove(name)),
                Item::Merge { image, args, env } => {
                    let (old_image, old_args, mut words) = out.remove(name).unwrap_or_default();
                    for (name, value) in env {
                        match value {
                            Some(value) => drop(words.insert(name.clone(), value.clone())),
                            None => drop(words.remove(name)),
                        }
                    }
                    out.insert(name.clone(), (image.on(old_image), args.on(old_args), words));
                }
            }
        }
        out
    }

    fn selector_of(&self, doc: &Doc) -> Option<Words> {
        // Upstream drops a map that says how to merge itself where there is nothing to merge with.
        match &self.selector {
            Selector::Leave => doc.selector.clone(),
            Selector::Delete => doc.selector.as_ref().map(|_| Words::new()),
            Selector::Replace(words) => doc.selector.as_ref().map(|_| words.clone()),
            Selector::Merge(words) => {
                let mut out = doc.selector.clone().unwrap_or_default();
                for (key, value) in words {
                    match value {
                        Some(value) => drop(out.insert(key.clone(), value.clone())),
                        None => drop(out.remove(key)),
                    }
                }
                Some(out)
            }
        }
    }
}

fn texts(list: &Value) -> Vec<String> {
    list.as_array().into_iter().flatten().map(|v| v.as_str().unwrap().to_owned()).collect()
}

fn by_name(list: &Value) -> Vec<String> {
    list.as_array().into_iter().flatten().map(|item| item["name"].as_str().unwrap().to_owned()).collect()
}

/// Those of `all` that are in `some`, in the order of `all`.
fn among(all: &[String], some: &[String]) -> Vec<String> {
    all.iter().filter(|name| some.contains(name)).cloned().collect()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    #[test]
    fn directives_do_what_they_say(doc in doc(), patch in patch()) {
        let def = lookup(&Gvk::new("", "v1", "Pod")).unwrap();
        let (mut got, sent) = (doc.value(), patch.value());
        strategic_merge(def, &mut got, &sent).unwrap();
        let spec = &got["spec"];

        let want = patch.containers_of(&doc);
        let order = by_name(&spec["containers"]);
        prop_assert_eq!(order.len(), want.len(), "each once: {} {} {}", doc.value(), sent, got);
        for item in spec["containers"].as_array().unwrap() {
            let env = item["env"].as_array().into_iter().flatten();
            let env: Words = env.map(|e| (e["name"].as_str().unwrap().into(), e["value"].as_str().unwrap().into())).collect();
            let args = item.get("args").map(texts);
            let found = (item["image"].as_str().map(str::to_owned), args, env);
            prop_assert_eq!(Some(&found), want.get(item["name"].as_str().unwrap()), "{} {} {}", doc.value(), sent, got);
            prop_assert!(!item.to_string().contains('$'), "{}", got);
        }
        let live: Vec<String> = doc.containers.iter().map(|(name, _)| name.clone()).collect();
        let named = patch.order.clone().unwrap_or_else(|| kept(&patch.containers).map(|(name, _)| name.clone()).collect());
        prop_assert_eq!(among(&order, &named), among(&named, &order), "the patch's order: {} {} {}", doc.value(), sent, got);
        let others: Vec<String> = live.iter().filter(|name| !named.contains(name)).cloned().collect();
        prop_assert_eq!(among(&order, &others), among(&others, &order), "the rest keeps its own");

        let selector = spec.get("nodeSelector").map(|s| serde_json::from_value::<Words>(s.clone()).unwrap());
        prop_assert_eq!(selector, patch.selector_of(&doc));

        let old = doc.finalizers.clone().unwrap_or_default();
        let mut want: Vec<String> = old.iter().filter(|f| !patch.unwanted.contains(f)).cloned().collect();
        want.extend(patch.finalizers.iter().filter(|f| !old.contains(f)).cloned());
        let mut finalizers = texts(&got["metadata"]["finalizers"]);
        prop_assert_eq!(among(&finalizers, &patch.finalizers), patch.finalizers.clone());
        want.sort();
        finalizers.sort();
        prop_assert_eq!(finalizers, want);

        let tolerations = spec.get("tolerations").map(|t| t.as_array().unwrap().clone());
        let want = patch.tolerations.on(doc.tolerations.clone());
        prop_assert_eq!(tolerations, want.map(|keys| keys.iter().map(toleration).collect::<Vec<_>>()));

        let mut want = doc.volumes.clone();
        want.extend(patch.volumes.clone());
        let volumes = spec["volumes"].as_array().unwrap();
        prop_assert_eq!(volumes.len(), want.len());
        for volume in volumes {
            let source = &want[volume["name"].as_str().unwrap()];
            prop_assert_eq!(volume, &json!({"name": volume["name"], source.as_str(): {}}));
        }
    }
}
