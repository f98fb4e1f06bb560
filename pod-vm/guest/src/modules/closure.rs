//! The modules that are wanted and those that they need, each after all that it needs.

use std::collections::{BTreeMap, BTreeSet};

use super::modinfo::name as module_name;
use super::tree::{Loaded, Tree};
use super::{ModuleError, Wanted, When};

/// Most modules that one may need. Those of a distribution need 20 at most.
const MOST_NEEDS: usize = 256;

/// A module of the guest.
#[derive(Debug)]
pub(crate) struct Module {
    pub(crate) name: String,
    pub(crate) when: When,
    /// The ELF file.
    pub(crate) content: Vec<u8>,
    /// All modules that must be loaded before it, in load order.
    pub(crate) needs: Vec<String>,
    /// Names, with wildcards, by which the kernel asks for it.
    pub(crate) aliases: Vec<String>,
}

/// What was found for what is wanted.
#[derive(Debug, Default)]
pub(crate) struct Closure {
    /// In load order.
    pub(crate) modules: Vec<Module>,
    /// Wanted modules that are part of the kernel, sorted.
    pub(crate) builtin: Vec<String>,
    /// Wanted modules that this kernel does not have, sorted.
    pub(crate) missing: Vec<String>,
}

/// Finds the modules. `extra` names more of them, which must exist.
pub(crate) fn resolve(
    tree: &Tree,
    release: &str,
    wanted: &[Wanted],
    extra: &[String],
) -> Result<Closure, ModuleError> {
    let mut search = Search {
        tree,
        release,
        found: BTreeMap::new(),
        order: Vec::new(),
        absent: BTreeSet::new(),
        dropped: BTreeSet::new(),
    };
    let mut closure = Closure::default();
    // What is loaded at the start comes first, and pulls what it needs with it.
    for when in [When::Start, When::Demand] {
        for module in wanted.iter().filter(|module| module.when == when) {
            if tree.has(module.name) {
                search.add(module.name)?;
                search.mark(module.name, when);
            } else if tree.is_builtin(module.name) {
                closure.builtin.push(module.name.to_owned());
            } else if module.required {
                return Err(ModuleError::Missing { name: module.name, why: module.why });
            } else {
                closure.missing.push(module.name.to_owned());
            }
        }
    }
    for given in extra {
        let name = module_name(given).ok_or_else(|| ModuleError::Unknown(given.clone()))?;
        if tree.has(&name) {
            search.add(&name)?;
            search.mark(&name, When::Demand);
        } else if tree.is_builtin(&name) {
            closure.builtin.push(name);
        } else {
            return Err(ModuleError::Unknown(given.clone()));
        }
    }
    closure.missing.extend(search.absent);
    for list in [&mut closure.builtin, &mut closure.missing] {
        list.sort();
        list.dedup();
    }
    closure.modules = search.order.iter().filter_map(|name| search.found.remove(name)).collect();
    Ok(closure)
}

struct Search<'t> {
    tree: &'t Tree,
    release: &'t str,
    found: BTreeMap<String, Module>,
    /// Names in load order.
    order: Vec<String>,
    /// Soft dependencies that this kernel has under no name.
    absent: BTreeSet<String>,
    /// Soft dependencies (of the first on the second) that would close a circle: they are only wishes.
    dropped: BTreeSet<(String, String)>,
}

/// A module whose dependencies are being visited.
struct Visit {
    name: String,
    loaded: Loaded,
    /// What it needs, not yet visited, last first; and whether it only wishes so.
    open: Vec<(String, bool)>,
    needs: Vec<String>,
    /// Whether the one before it on the stack only wishes for it.
    is_wish: bool,
}

impl Search<'_> {
    /// Adds a module that has a file, after all it needs.
    fn add(&mut self, name: &str) -> Result<(), ModuleError> {
        let mut waiting = vec![name.to_owned()];
        while let Some(name) = waiting.pop() {
            while !self.found.contains_key(&name) {
                self.descend(&name, &mut waiting)?;
            }
        }
        Ok(())
    }

    /// Adds a module, or drops a soft dependency because of which that cannot be done. What should be loaded after the modules is
    /// added to `after`. The stack is not the program's: a hostile directory has chains of any length.
    fn descend(&mut self, name: &str, after: &mut Vec<String>) -> Result<(), ModuleError> {
        let mut stack = vec![self.visit(name, false)?];
        while let Some(visit) = stack.last_mut() {
            let Some((next, is_wish)) = visit.open.pop() else {
                // `last_mut` found it.
                let Some(visit) = stack.pop() else { break };
                after.extend(self.finish(visit)?);
                continue;
            };
            if self.found.contains_key(&next) {
                visit.needs.push(next);
                continue;
            }
            // It is looked at again, and found then.
            visit.open.push((next.clone(), is_wish));
            if let Some(at) = stack.iter().position(|visit| visit.name == next) {
                return self.break_circle(&stack[at..], next, is_wish);
            }
            let inner = self.visit(&next, is_wish)?;
            stack.push(inner);
        }
        Ok(())
    }

    /// Drops the last wish of a circle. `last` and `is_wish` are the edge that closes it.
    fn break_circle(&mut self, circle: &[Visit], last: String, is_wish: bool) -> Result<(), ModuleError> {
        let mut edges = circle.windows(2).rev().filter(|pair| pair[1].is_wish);
        let closing = circle.last().filter(|_| is_wish).map(|visit| (visit.name.clone(), last.clone()));
        let dropped =
            closing.or_else(|| edges.next().map(|pair| (pair[0].name.clone(), pair[1].name.clone())));
        match dropped {
            Some(edge) => {
                self.dropped.insert(edge);
                Ok(())
            }
            None => Err(ModuleError::Circle(
                circle.iter().map(|visit| visit.name.clone()).chain([last]).collect(),
            )),
        }
    }

    /// Reads a module and what it needs.
    fn visit(&mut self, name: &str, is_wish: bool) -> Result<Visit, ModuleError> {
        let missing =
            |needs: &str| ModuleError::MissingDependency { name: name.to_owned(), needs: needs.to_owned() };
        let loaded = self.tree.load(name)?.ok_or_else(|| ModuleError::Unknown(name.to_owned()))?;
        if loaded.info.release != self.release {
            return Err(ModuleError::OtherKernel {
                name: name.to_owned(),
                found: loaded.info.release,
                expected: self.release.to_owned(),
            });
        }
        let mut open = Vec::new();
        for needs in &loaded.info.before {
            let needs =
                self.soft(needs).filter(|needs| !self.dropped.contains(&(name.to_owned(), needs.clone())));
            open.extend(needs.map(|needs| (needs, true)));
        }
        for needs in &loaded.info.depends {
            let module = module_name(needs).ok_or_else(|| missing(needs))?;
            if self.tree.has(&module) {
                open.push((module, false));
            } else if !self.tree.is_builtin(&module) {
                return Err(missing(needs));
            }
        }
        open.reverse();
        Ok(Visit { name: name.to_owned(), loaded, open, needs: Vec::new(), is_wish })
    }

    /// A soft dependency as a module with a file. One that does not exist is remembered and does no harm.
    fn soft(&mut self, wanted: &str) -> Option<String> {
        let module = module_name(wanted).filter(|name| self.tree.has(name));
        if module.is_none() && !self.tree.is_builtin(wanted) && wanted.chars().all(|c| c.is_ascii_graphic()) {
            self.absent.insert(wanted.to_owned());
        }
        module
    }

    /// Takes a module whose dependencies are all there; gives what should be loaded after it.
    fn finish(&mut self, visit: Visit) -> Result<Vec<String>, ModuleError> {
        let Visit { name, loaded, needs: direct, .. } = visit;
        let mut needs: Vec<String> = Vec::new();
        for direct in direct {
            let further = self.found.get(&direct).map(|module| module.needs.as_slice()).unwrap_or_default();
            for need in further.iter().chain([&direct]) {
                if !needs.contains(need) {
                    needs.push(need.clone());
                }
            }
        }
        if needs.len() > MOST_NEEDS {
            return Err(ModuleError::TooManyNeeds { name, limit: MOST_NEEDS });
        }
        let after = loaded.info.after.iter().filter_map(|wanted| self.soft(wanted)).collect();
        self.order.push(name.clone());
        let module = Module {
            name: name.clone(),
            when: When::Demand,
            content: loaded.content,
            needs,
            aliases: loaded.info.aliases,
        };
        self.found.insert(name, module);
        Ok(after)
    }

    /// Says when a module and all that it needs are loaded.
    fn mark(&mut self, name: &str, when: When) {
        let needs = self.found.get(name).map(|module| module.needs.clone()).unwrap_or_default();
        for name in needs.iter().map(String::as_str).chain([name]) {
            if let Some(module) = self.found.get_mut(name) {
                module.when = module.when.min(when);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use proptest::prelude::*;

    use super::*;
    use crate::fake;

    const WANTED: [Wanted; 4] = [
        Wanted { name: "first", when: When::Start, required: true, why: "test" },
        Wanted { name: "second", when: When::Start, required: false, why: "test" },
        Wanted { name: "third", when: When::Demand, required: false, why: "test" },
        Wanted { name: "absent", when: When::Demand, required: false, why: "test" },
    ];

    fn find(files: &[(&str, &[&str])], extra: &[&str]) -> Result<Closure, ModuleError> {
        let directory = tempfile::tempdir().unwrap();
        let files: Vec<(String, Vec<u8>)> =
            files.iter().map(|(name, info)| (format!("kernel/{name}.ko"), fake::module(info))).collect();
        let files: Vec<(&str, Vec<u8>)> =
            files.iter().map(|(path, file)| (path.as_str(), file.clone())).collect();
        fake::modules(directory.path(), &files);
        let extra: Vec<String> = extra.iter().map(|name| (*name).to_owned()).collect();
        resolve(&Tree::open(directory.path()).unwrap(), fake::RELEASE, &WANTED, &extra)
    }

    fn names(closure: &Closure) -> Vec<&str> {
        closure.modules.iter().map(|module| module.name.as_str()).collect()
    }

    #[test]
    fn a_module_stands_after_all_it_needs() {
        let closure = find(
            &[
                ("first", &["depends=lib-a,lib_b", "alias=x"]),
                ("lib_a", &["depends=lib_b"]),
                ("lib-b", &["softdep=pre: crypto-crc nowhere post: late"]),
                ("third", &["depends=lib_c,veth"]),
                ("lib_c", &["depends=lib_b"]),
                ("late", &[]),
                ("unneeded", &[]),
            ],
            &["late"],
        )
        .unwrap();
        assert_eq!(names(&closure), ["lib_b", "lib_a", "first", "late", "lib_c", "third"]);
        let needs: Vec<&[String]> = closure.modules.iter().map(|module| module.needs.as_slice()).collect();
        assert_eq!(needs[2], ["lib_b", "lib_a"]);
        assert_eq!(needs[5], ["lib_b", "lib_c"]);
        let start: Vec<bool> = closure.modules.iter().map(|module| module.when == When::Start).collect();
        assert_eq!(start, [true, true, true, false, false, false]);
        // `crypto-crc` is an alias of something built in.
        assert_eq!(closure.missing, ["absent", "nowhere", "second"]);
        assert_eq!(
            super::super::write(&closure.modules),
            "podvisor-modules 1\nstart lib_b\nstart lib_a lib_b\nstart first lib_b lib_a\ndemand late\ndemand lib_c lib_b\ndemand third lib_b lib_c\nalias x first\n"
        );
    }

    #[test]
    fn what_is_wrong_is_named() {
        let reason =
            |files: &[(&str, &[&str])], extra: &[&str]| fake::chain(&find(files, extra).unwrap_err());
        assert!(reason(&[], &[]).contains("the kernel has no first (test)"));
        let first: (&str, &[&str]) = ("first", &[]);
        assert!(reason(&[first], &["nothing"]).contains("there is no module nothing"));
        assert!(reason(&[first], &["../first"]).contains("there is no module ../first"));
        assert!(
            reason(&[("first", &["depends=gone"])], &[]).contains("first needs gone, which is not there")
        );
        assert!(reason(&[("first", &["depends=../../x"])], &[]).contains("first needs ../../x"));
        let circle: [(&str, &[&str]); 3] =
            [("first", &["depends=a"]), ("a", &["depends=b"]), ("b", &["depends=a"])];
        assert!(reason(&circle, &[]).contains("in a circle: a → b → a"));
        assert!(reason(&[("first", &["depends=first"])], &[]).contains("first → first"));
        assert!(reason(&[("first", &["vermagic=5.0 SMP"])], &[]).contains("belongs to kernel 5.0, not to"));
    }

    #[test]
    fn wishes_that_close_a_circle_are_dropped() {
        let closure = find(
            &[
                ("first", &["softdep=pre: a"]),
                ("a", &["depends=b"]),
                ("b", &["depends=first", "softdep=pre: b"]),
            ],
            &["a"],
        );
        assert_eq!(names(&closure.unwrap()), ["first", "b", "a"]);
    }

    #[test]
    fn chains_are_followed_to_a_bound() {
        let chain = |length: usize| {
            let modules: Vec<(String, String)> =
                (0..length).map(|i| (format!("m{i}"), format!("depends=m{}", i + 1))).collect();
            let mut fields: Vec<[&str; 1]> = modules.iter().map(|(_, depends)| [depends.as_str()]).collect();
            fields[length - 1] = ["depends="];
            let mut files: Vec<(&str, &[&str])> = modules
                .iter()
                .zip(&fields)
                .map(|((name, _), field)| (name.as_str(), field.as_slice()))
                .collect();
            files.push(("first", &["depends=m0"]));
            find(&files, &[])
        };
        let closure = chain(MOST_NEEDS).unwrap();
        assert_eq!(closure.modules.len(), MOST_NEEDS + 1);
        assert_eq!(closure.modules[0].name, "m255");
        assert!(matches!(chain(MOST_NEEDS + 1), Err(ModuleError::TooManyNeeds { .. })));
    }

    #[test]
    fn an_update_goes_before_the_kernels_own() {
        let directory = tempfile::tempdir().unwrap();
        let files = [
            ("kernel/first.ko", fake::module(&["alias=old"])),
            ("updates/dkms/first.ko.zst", fake::compress("zstd", &fake::module(&["alias=new"]))),
        ];
        fake::modules(directory.path(), &files);
        // Links lead nowhere: as `build` does after a kernel's sources were removed, or in a circle.
        std::os::unix::fs::symlink("/nowhere", directory.path().join("build")).unwrap();
        std::os::unix::fs::symlink("..", directory.path().join("kernel/up")).unwrap();
        let tree = Tree::open(directory.path()).unwrap();
        assert_eq!(tree.len(), 1);
        let closure = resolve(&tree, fake::RELEASE, &WANTED, &[]).unwrap();
        assert_eq!(closure.modules[0].aliases, ["new"]);
    }

    #[test]
    fn a_directory_without_the_list_of_built_in_modules_is_refused() {
        let directory = tempfile::tempdir().unwrap();
        let reason = fake::chain(&Tree::open(directory.path()).unwrap_err());
        assert!(reason.contains("no readable file modules.builtin"), "{reason}");
        fs::create_dir(directory.path().join("modules.builtin")).unwrap();
        let reason = fake::chain(&Tree::open(directory.path()).unwrap_err());
        assert!(reason.contains("no regular file"), "{reason}");
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        #[test]
        fn damaged_modules_do_no_harm(
            how in 0..5usize,
            changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..6),
        ) {
            let module = fake::module(&["depends=third", "alias=x", "softdep=pre: third"]);
            let mut file = match fake::PACKINGS.get(how) {
                Some(how) => fake::compress(how, &module),
                None => module,
            };
            for (at, byte) in changes {
                let at = at.index(file.len());
                file[at] = byte;
            }
            let directory = tempfile::tempdir().unwrap();
            fake::modules(directory.path(), &[("first.ko.xz", file), ("third.ko", fake::module(&[]))]);
            let tree = Tree::open(directory.path()).unwrap();
            let _ = resolve(&tree, fake::RELEASE, &WANTED, &[]);
        }
    }
}
