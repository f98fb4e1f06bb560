//! Programs that are told what to fail: shell scripts before an OCI runtime, and in the place of a CNI plugin.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

/// What a call does in place of its work.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    /// Says something on standard error and ends with 1.
    Fail,
    /// Does not end.
    Hang,
    /// Is killed before it has done anything.
    Die,
    /// Does its work and is killed then.
    DieAfter,
    /// Answers what nobody can understand (and succeeds).
    Garbage,
    /// Does its work a second late.
    Slow,
}

impl Fault {
    fn name(self) -> &'static str {
        match self {
            Self::Fail => "fail",
            Self::Hang => "hang",
            Self::Die => "die",
            Self::DieAfter => "die-after",
            Self::Garbage => "garbage",
            Self::Slow => "slow",
        }
    }
}

/// Common to both scripts: counts the call of `$verb` and does what is planned for it; sets `$after` to die afterwards.
const PLAN: &str = r#"
echo >>"$place/calls.$verb"
after=
if [ -e "$place/plan.$verb" ]; then
    read -r wanted fault <"$place/plan.$verb"
    if [ "$wanted" = 0 ] || [ "$(wc -l <"$place/calls.$verb")" = "$wanted" ]; then
        case $fault in
            fail) echo "told to fail at $verb" >&2; exit 1 ;;
            hang) exec sleep 100000 ;;
            die) kill -KILL $$ ;;
            die-after) after=yes ;;
            garbage) echo '{"this is": nothing'; exit 0 ;;
            slow) sleep 1 ;;
        esac
    fi
fi
"#;

/// As a word for a shell and for TOML; the paths of tests have no odd characters.
pub fn quoted(path: &Path) -> String {
    format!("\"{}\"", path.display())
}

/// A script with its plan.
#[derive(Debug, Clone)]
pub struct Wrapper {
    place: PathBuf,
    program: PathBuf,
}

impl Wrapper {
    /// Before an OCI runtime.
    pub fn runtime(place: &Path, original: &Path) -> Result<Self> {
        let original = quoted(original);
        let script = format!(
            "#!/bin/sh\nplace={}\nverb=other\nfor word; do case $word in\n    \
             create|start|kill|delete|exec|update|state) verb=$word; break ;;\nesac; done\n{PLAN}\n\
             [ -n \"$after\" ] || exec {original} \"$@\"\n{original} \"$@\"\nkill -KILL $$\n",
            quoted(place)
        );
        Self::write(place, "runtime", &script)
    }

    /// A CNI plugin of that name in `place`, which gives every pod the same address.
    pub fn plugin(place: &Path, name: &str) -> Result<Self> {
        let script = format!(
            "#!/bin/sh\nplace={}\nverb=$CNI_COMMAND\ncat >/dev/null\n{PLAN}\n\
             [ \"$verb\" != ADD ] || echo '{{\"cniVersion\": \"1.0.0\", \"interfaces\": [{{\"name\": \"eth0\", \
             \"sandbox\": \"'\"$CNI_NETNS\"'\"}}], \"ips\": [{{\"address\": \"10.123.0.5/24\", \"interface\": 0}}]}}'\n\
             [ -z \"$after\" ] || kill -KILL $$\n",
            quoted(place)
        );
        Self::write(place, name, &script)
    }

    fn write(place: &Path, name: &str, script: &str) -> Result<Self> {
        fs::create_dir_all(place)?;
        let program = place.join(name);
        fs::write(&program, script).with_context(|| format!("writing {}", program.display()))?;
        fs::set_permissions(&program, fs::Permissions::from_mode(0o755))?;
        Ok(Self { place: place.to_owned(), program })
    }

    /// The script.
    pub fn program(&self) -> &Path {
        &self.program
    }

    /// Lets the `nth` call of `verb` from now on fail like that; 0: every one.
    pub fn plan(&self, verb: &str, nth: u32, fault: Fault) -> Result<()> {
        fs::write(self.place.join(format!("calls.{verb}")), "")?;
        let new = self.place.join(format!("plan.{verb}.new"));
        fs::write(&new, format!("{nth} {}\n", fault.name()))?;
        Ok(fs::rename(new, self.place.join(format!("plan.{verb}")))?)
    }

    /// Nothing fails any more.
    pub fn behave(&self) -> Result<()> {
        for entry in fs::read_dir(&self.place)? {
            let path = entry?.path();
            if path.file_name().is_some_and(|name| name.to_string_lossy().starts_with("plan.")) {
                fs::remove_file(path)?;
            }
        }
        Ok(())
    }

    /// Calls of `verb` since it was planned last, or ever.
    pub fn calls(&self, verb: &str) -> usize {
        fs::read_to_string(self.place.join(format!("calls.{verb}"))).map_or(0, |text| text.lines().count())
    }
}
