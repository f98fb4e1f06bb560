use super::*;
use crate::ErrorKind;
use crate::testing::{Case, GROUP, PASSWD, field_of, int};

type Security = cri::LinuxContainerSecurityContext;

fn of(image: &str, security: &Security) -> Result<User> {
    resolve(Some(security), image, PASSWD, GROUP)
}

#[test]
fn users_and_groups() {
    let user = |uid| Security { run_as_user: int(uid), ..Default::default() };
    let named = |name: &str| Security { run_as_username: name.to_owned(), ..Default::default() };
    let with_group = |security: Security, gid| Security { run_as_group: int(gid), ..security };
    let with_groups = |security: Security, groups: &[i64], policy| Security {
        supplemental_groups: groups.to_vec(),
        supplemental_groups_policy: policy,
        ..security
    };
    let none = Security::default();
    #[rustfmt::skip]
    let table: [(&str, Security, (u32, u32, &[u32])); 21] = [
        // The image's forms.
        ("", none.clone(), (0, 0, &[0, 50])),
        ("app", none.clone(), (1000, 1001, &[1001, 44, 108])),
        ("1000", none.clone(), (1000, 1001, &[1001, 44, 108])),
        ("7777", none.clone(), (7777, 0, &[0])),
        ("app:video", none.clone(), (1000, 44, &[44, 108])),
        ("app:0", none.clone(), (1000, 0, &[0, 44, 108])),
        ("7:8", none.clone(), (7, 8, &[8])),
        (":video", none.clone(), (0, 44, &[44, 50])),
        ("app:", none.clone(), (1000, 1001, &[1001, 44, 108])),
        ("1234", none.clone(), (55, 56, &[56])), // a user of that name
        // The request wins, and the image's group goes with the image's user.
        ("app:video", user(0), (0, 0, &[0, 50])),
        ("app", user(1000), (1000, 1001, &[1001, 44, 108])),
        ("app", user(2), (2, 0, &[0])),
        ("", named("app"), (1000, 1001, &[1001, 44, 108])),
        ("", with_group(named("app"), 9), (1000, 9, &[9, 44, 108])),
        ("", with_group(user(5), 6), (5, 6, &[6])),
        ("", user(4_294_967_294), (4_294_967_294, 0, &[0])),
        // Supplementary groups.
        ("app", with_groups(none.clone(), &[44, 70, 70], 0), (1000, 1001, &[1001, 44, 70, 108])),
        ("app", with_groups(none.clone(), &[70], 1), (1000, 1001, &[1001, 70])),
        ("app", with_groups(none.clone(), &[], 1), (1000, 1001, &[1001])),
        ("", with_groups(with_group(user(1), 2), &[2, 0], 1), (1, 2, &[2, 0])),
    ];
    for (image, security, (uid, gid, groups)) in table {
        let found = of(image, &security).unwrap();
        assert_eq!(
            found,
            User { uid, gid, supplemental_groups: groups.to_vec() },
            "image user {image:?}, {security:?}"
        );
    }
}

#[test]
fn refused_by_name() {
    let base = || Security { run_as_user: int(1), ..Default::default() };
    #[rustfmt::skip]
    let table: [(&str, Security, ErrorKind, &str); 13] = [
        ("nobody", Security::default(), ErrorKind::NotFound, "image user"),
        ("app:nogroup", Security::default(), ErrorKind::NotFound, "image user"),
        ("4294967295", Security::default(), ErrorKind::NotFound, "image user"),
        ("-1", Security::default(), ErrorKind::NotFound, "image user"),
        ("huge", Security::default(), ErrorKind::NotFound, "image user"),
        ("", Security { run_as_username: "x".into(), ..Default::default() }, ErrorKind::NotFound, "run_as_username"),
        ("", Security { run_as_username: "app".into(), ..base() }, ErrorKind::Invalid, "run_as_username"),
        ("app", Security { run_as_group: int(1), ..Default::default() }, ErrorKind::Invalid, "run_as_group"),
        ("", Security { run_as_user: int(-1), ..Default::default() }, ErrorKind::Invalid, "run_as_user"),
        ("", Security { run_as_user: int(4_294_967_295), ..Default::default() }, ErrorKind::Invalid, "run_as_user"),
        ("", Security { run_as_group: int(1 << 40), ..base() }, ErrorKind::Invalid, "run_as_group"),
        ("", Security { supplemental_groups: vec![1, -2], ..base() }, ErrorKind::Invalid, "supplemental_groups[1]"),
        ("", Security { supplemental_groups_policy: 7, ..base() }, ErrorKind::Invalid, "supplemental_groups_policy"),
    ];
    for (image, security, kind, field) in table {
        let error = of(image, &security).unwrap_err();
        assert_eq!(error.kind(), kind, "{error}");
        assert!(field_of(&error).ends_with(field), "{error} does not name {field}");
    }
}

#[test]
fn status_tells_what_the_spec_has() {
    let spec = Case::with(|case| case.security().run_as_username = "app".to_owned()).spec();
    let user = User::of(&spec).unwrap();
    assert_eq!(user, User { uid: 1000, gid: 1001, supplemental_groups: vec![1001, 44, 108] });
}
