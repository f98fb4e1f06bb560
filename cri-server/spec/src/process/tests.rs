use super::*;
use crate::ErrorKind;
use crate::testing::{Case, strings};

fn args(case: &Case) -> Vec<String> {
    case.process().args().clone().unwrap()
}

fn env(case: &Case) -> Vec<String> {
    case.process().env().clone().unwrap()
}

#[test]
fn command_rules() {
    #[rustfmt::skip]
    let table: [(&[&str], &[&str], &[&str]); 4] = [
        (&[], &[], &["/entry", "default"]),
        (&["/cmd"], &[], &["/cmd"]),
        (&[], &["x", "y"], &["/entry", "x", "y"]),
        (&["/cmd", "1"], &["2"], &["/cmd", "1", "2"]),
    ];
    for (command, arguments, expected) in table {
        let case = Case::with(|case| {
            case.config.command = strings(command);
            case.config.args = strings(arguments);
        });
        assert_eq!(args(&case), expected);
    }
    let only_cmd = Case::with(|case| {
        case.image.set_entrypoint(None);
    });
    assert_eq!(args(&only_cmd), ["default"]);
}

#[test]
fn nothing_to_run() {
    let mut case = Case::with(|case| {
        case.image.set_entrypoint(None).set_cmd(None);
    });
    assert_eq!(case.refused(), (ErrorKind::Invalid, "config.command".to_owned()));
    case.config.args = strings(&["", "x"]);
    assert_eq!(case.refused(), (ErrorKind::Invalid, "config.command".to_owned()));
}

#[test]
fn hostile_strings_are_refused_by_name() {
    let long = "x".repeat(128 << 10);
    let table: [(&dyn Fn(&mut Case), &str); 9] = [
        (&|case| case.config.command = strings(&["/a", "b\0"]), "config.command[1]"),
        (&|case| case.config.args = vec![long.clone()], "config.args[0]"),
        (&|case| case.config.working_dir = "relative".to_owned(), "config.working_dir"),
        (&|case| case.config.working_dir = "/a\0".to_owned(), "config.working_dir"),
        (&|case| case.config.envs = vec![key_value("", b"x")], "config.envs[0].key"),
        (&|case| case.config.envs = vec![key_value("A", b"x"), key_value("A=B", b"x")], "config.envs[1].key"),
        (&|case| case.config.envs = vec![key_value("A", b"a\0b")], "config.envs[0].value"),
        (&|case| case.config.envs = vec![key_value("A", &[0xff])], "config.envs[0].value"),
        (&|case| case.config.envs = vec![key_value("A", long.as_bytes())], "config.envs[0].value"),
    ];
    for (change, field) in table {
        assert_eq!(Case::with(change).refused(), (ErrorKind::Invalid, field.to_owned()));
    }
    let image = Case::with(|case| {
        case.image.set_entrypoint(Some(strings(&["/a\0"])));
    });
    assert_eq!(image.refused().1, "image command");
}

fn key_value(key: &str, value: &[u8]) -> cri::KeyValue {
    cri::KeyValue { key: key.to_owned(), value: value.to_vec() }
}

#[test]
fn environment_in_order() {
    let case = Case::with(|case| {
        case.config.envs = vec![
            key_value("B", b"request"),
            key_value("C", b"a=b"),
            key_value("B", b"last"),
            key_value("E", b""),
        ];
    });
    assert_eq!(env(&case), [DEFAULT_PATH, "HOSTNAME=pod-host", "A=image", "B=last", "C=a=b", "E="]);
}

#[test]
fn environment_of_the_image_wins_over_defaults() {
    let case = Case::with(|case| {
        case.config.tty = true;
        case.image.set_env(Some(strings(&["PATH=/bin", "TERM=dumb", "no-value", "=x", "HOSTNAME=own"])));
    });
    assert_eq!(env(&case), ["PATH=/bin", "TERM=dumb", "HOSTNAME=own"]);
    let terminal = Case::with(|case| case.config.tty = true);
    assert!(env(&terminal).contains(&"TERM=xterm".to_owned()));
    assert_eq!(terminal.process().terminal(), Some(true));
    assert!(!env(&Case::default()).iter().any(|entry| entry.starts_with("TERM=")));
}

#[test]
fn host_name_of_the_node_where_the_pod_has_none() {
    let case = Case::with(|case| case.sandbox.hostname.clear());
    let node = rustix::system::uname().nodename().to_string_lossy().into_owned();
    assert!(env(&case).contains(&format!("HOSTNAME={node}")));
}

#[test]
fn working_directory_rules() {
    for (requested, image, expected) in [
        ("", "", "/"),
        ("", "/srv", "/srv"),
        ("/own", "/srv", "/own"),
        ("", "srv/../app", "/app"),
        ("/a//b/.", "", "/a/b"),
    ] {
        let case = Case::with(|case| {
            case.config.working_dir = requested.to_owned();
            case.image.set_working_dir(Some(image.to_owned()));
        });
        assert_eq!(case.process().cwd().to_str(), Some(expected));
    }
}

#[test]
fn nothing_comes_from_defaults_of_the_library() {
    let process = Case::default().process();
    assert_eq!(process.rlimits(), &None);
    assert_eq!(process.no_new_privileges(), Some(false));
    assert_eq!(process.oom_score_adj(), Some(0));
    assert_eq!(process.apparmor_profile(), &None);
    assert_eq!(process.terminal(), Some(false));
}

#[test]
fn exec_keeps_confinement() {
    let spec = Case::with(|case| {
        case.security().no_new_privs = true;
        case.security().run_as_user = crate::testing::int(1000);
        case.apparmor = Some("profile".to_owned());
        case.config.working_dir = "/srv".to_owned();
    })
    .spec();
    let first = spec.process().as_ref().unwrap();
    let plain = exec(&spec, &strings(&["ls", "-l"]), false).unwrap();
    assert_eq!(plain.args().as_ref().unwrap(), &["ls", "-l"]);
    assert_eq!(plain.terminal(), Some(false));
    assert_eq!(plain.env(), first.env());
    assert_eq!(
        (
            plain.user(),
            plain.capabilities(),
            plain.cwd(),
            plain.no_new_privileges(),
            plain.apparmor_profile()
        ),
        (first.user(), first.capabilities(), first.cwd(), Some(true), &Some("profile".to_owned()))
    );
    let terminal = exec(&spec, &strings(&["sh"]), true).unwrap();
    assert_eq!(terminal.terminal(), Some(true));
    assert_eq!(terminal.env().as_ref().unwrap().last().unwrap(), "TERM=xterm");
}

#[test]
fn exec_refuses_what_cannot_run() {
    let spec = Case::default().spec();
    for (command, field) in [(vec![], "cmd"), (strings(&[""]), "cmd[0]"), (strings(&["a", "b\0"]), "cmd[1]")]
    {
        let error = exec(&spec, &command, false).unwrap_err();
        assert_eq!(crate::testing::field_of(&error), field);
    }
    let mut dead = spec;
    dead.set_process(None);
    assert!(exec(&dead, &strings(&["ls"]), false).is_err());
}
