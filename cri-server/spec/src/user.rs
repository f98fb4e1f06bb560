//! Who a container's processes run as.
//!
//! Names are looked up in the texts of the image's `/etc/passwd` and `/etc/group`; their lines are hostile input, and one that does not parse
//! counts as not there.

use podvisor_proto::cri;

use crate::error::{Result, SpecError};

/// Who a container's processes run as, for ContainerStatus.user.
#[derive(Debug, Clone, PartialEq, Eq)]
#[allow(missing_docs)]
pub struct User {
    pub uid: u32,
    pub gid: u32,
    /// With the primary group first.
    pub supplemental_groups: Vec<u32>,
}

impl User {
    /// From a container's spec. `None`: it has no process.
    pub fn of(spec: &oci_spec::runtime::Spec) -> Option<Self> {
        let user = spec.process().as_ref()?.user();
        Some(Self {
            uid: user.uid(),
            gid: user.gid(),
            supplemental_groups: user.additional_gids().clone().unwrap_or_default(),
        })
    }
}

/// (uid_t) -1 means "leave as it is" to setresuid(2).
const MAX_ID: u32 = u32::MAX - 1;

const FIELD: &str = "config.linux.security_context";

/// Field name in errors for what comes from the image.
const IMAGE_USER: &str = "image user";

pub(crate) fn resolve(
    security: Option<&cri::LinuxContainerSecurityContext>,
    image_user: &str,
    passwd: &str,
    group: &str,
) -> Result<User> {
    let none = cri::LinuxContainerSecurityContext::default();
    let security = security.unwrap_or(&none);
    let accounts = Accounts { passwd, group };
    let requested_gid = match &security.run_as_group {
        Some(gid) => Some(id(|| format!("{FIELD}.run_as_group"), gid.value)?),
        None => None,
    };
    let (uid, entry, gid) = match (&security.run_as_user, security.run_as_username.as_str()) {
        (Some(_), name) if !name.is_empty() => {
            let why = "only one of run_as_user and run_as_username can be given";
            return Err(SpecError::invalid(format!("{FIELD}.run_as_username"), why));
        }
        (Some(uid), _) => {
            let uid = id(|| format!("{FIELD}.run_as_user"), uid.value)?;
            (uid, accounts.by_uid(uid), requested_gid)
        }
        (None, "") if requested_gid.is_some() => {
            let why = "needs run_as_user or run_as_username";
            return Err(SpecError::invalid(format!("{FIELD}.run_as_group"), why));
        }
        (None, "") => accounts.parse(IMAGE_USER, image_user)?,
        (None, name) => {
            let (uid, entry) = accounts.user(&format!("{FIELD}.run_as_username"), name)?;
            (uid, entry, requested_gid)
        }
    };
    let gid = gid.unwrap_or_else(|| entry.as_ref().map_or(0, |entry| entry.gid));

    // The primary group comes first: a process that can drop supplementary groups must not get rid of a deny rule for it (CVE-2022-36109).
    let mut groups = vec![gid];
    let mut push = |gid: u32| {
        if !groups.contains(&gid) {
            groups.push(gid);
        }
    };
    let policy = security.supplemental_groups_policy;
    match cri::SupplementalGroupsPolicy::try_from(policy) {
        Ok(cri::SupplementalGroupsPolicy::Merge) => {
            if let Some(entry) = &entry {
                accounts.groups_of(entry.name).for_each(&mut push);
            }
        }
        Ok(cri::SupplementalGroupsPolicy::Strict) => {}
        Err(_) => {
            let field = format!("{FIELD}.supplemental_groups_policy");
            return Err(SpecError::invalid(field, format!("{policy} is not a policy")));
        }
    }
    for (index, gid) in security.supplemental_groups.iter().enumerate() {
        push(id(|| format!("{FIELD}.supplemental_groups[{index}]"), *gid)?);
    }
    // As Linux has them in the end whatever the order (set_groups in kernel/groups.c); gVisor keeps them as they come.
    groups[1..].sort_unstable();
    Ok(User { uid, gid, supplemental_groups: groups })
}

fn id(field: impl FnOnce() -> String, value: i64) -> Result<u32> {
    u32::try_from(value)
        .ok()
        .filter(|id| *id <= MAX_ID)
        .ok_or_else(|| SpecError::invalid(field(), format!("{value} is not between 0 and {MAX_ID}")))
}

struct Accounts<'a> {
    passwd: &'a str,
    group: &'a str,
}

/// A line of passwd(5).
#[derive(Debug, Clone, PartialEq, Eq)]
struct Entry<'a> {
    name: &'a str,
    uid: u32,
    gid: u32,
}

impl<'a> Accounts<'a> {
    fn users(&self) -> impl Iterator<Item = Entry<'a>> + use<'a> {
        self.passwd.lines().filter_map(|line| {
            let mut fields = line.split(':');
            let name = fields.next().filter(|name| !name.is_empty())?;
            let uid = number(fields.nth(1)?)?;
            Some(Entry { name, uid, gid: number(fields.next()?)? })
        })
    }

    /// Name, number and members from group(5).
    fn groups(&self) -> impl Iterator<Item = (&'a str, u32, &'a str)> + use<'a> {
        self.group.lines().filter_map(|line| {
            let mut fields = line.split(':');
            let name = fields.next().filter(|name| !name.is_empty())?;
            let gid = number(fields.nth(1)?)?;
            Some((name, gid, fields.next().unwrap_or_default()))
        })
    }

    fn by_uid(&self, uid: u32) -> Option<Entry<'a>> {
        self.users().find(|entry| entry.uid == uid)
    }

    fn groups_of(&self, user: &'a str) -> impl Iterator<Item = u32> + use<'a> {
        self.groups()
            .filter(move |(_, _, members)| members.split(',').any(|member| member.trim() == user))
            .map(|(_, gid, _)| gid)
    }

    /// A name wins over a number, so that a user called "1000" can be had.
    fn user(&self, field: &str, name: &str) -> Result<(u32, Option<Entry<'a>>)> {
        if let Some(entry) = self.users().find(|entry| entry.name == name) {
            return Ok((entry.uid, Some(entry)));
        }
        match number(name) {
            Some(uid) => Ok((uid, self.by_uid(uid))),
            None => Err(SpecError::NotFound {
                field: field.into(),
                what: format!("user {name:?} in /etc/passwd"),
            }),
        }
    }

    /// `USER`, `USER:GROUP`, each a name or a number (OCI image spec, config.md, `User`); empty is root.
    fn parse(&self, field: &str, text: &str) -> Result<(u32, Option<Entry<'a>>, Option<u32>)> {
        let (user, group) = match text.split_once(':') {
            Some((user, group)) => (user, Some(group).filter(|group| !group.is_empty())),
            None => (text, None),
        };
        let (uid, entry) = if user.is_empty() { (0, self.by_uid(0)) } else { self.user(field, user)? };
        let gid = match group {
            None => None,
            Some(group) => match self.groups().find(|(name, ..)| *name == group) {
                Some((_, gid, _)) => Some(gid),
                None => Some(number(group).ok_or_else(|| SpecError::NotFound {
                    field: field.into(),
                    what: format!("group {group:?} in /etc/group"),
                })?),
            },
        };
        Ok((uid, entry, gid))
    }
}

fn number(text: &str) -> Option<u32> {
    text.parse().ok().filter(|id| *id <= MAX_ID)
}

#[cfg(test)]
mod tests;
