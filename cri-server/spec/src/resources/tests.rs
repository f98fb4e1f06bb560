use super::*;
use crate::ErrorKind;
use crate::testing::{Case, field_of};

fn of(case: &Case) -> LinuxResources {
    case.spec().linux().clone().unwrap().resources().clone().unwrap()
}

fn with(change: impl FnOnce(&mut cri::LinuxContainerResources)) -> Case {
    Case::with(|case| change(case.resources()))
}

fn json(resources: &LinuxResources) -> serde_json::Value {
    let mut value = serde_json::to_value(resources).unwrap();
    value.as_object_mut().unwrap().remove("devices");
    value
}

#[test]
fn nothing_asked_nothing_set() {
    assert_eq!(json(&of(&Case::default())), serde_json::json!({}));
    let bare = Case::with(|case| case.config.linux = None);
    assert_eq!(json(&of(&bare)), serde_json::json!({}));
    assert_eq!(bare.process().oom_score_adj(), Some(0));
}

#[test]
fn everything_asked() {
    let case = with(|request| {
        request.cpu_period = 100_000;
        request.cpu_quota = 50_000;
        request.cpu_shares = 512;
        request.cpuset_cpus = "0-1,3".to_owned();
        request.cpuset_mems = "0".to_owned();
        request.memory_limit_in_bytes = 1 << 30;
        request.memory_swap_limit_in_bytes = 2 << 30;
        request.hugepage_limits = vec![cri::HugepageLimit { page_size: "2MB".to_owned(), limit: 4 << 20 }];
        request.unified = [("memory.high".to_owned(), "900".to_owned())].into();
    });
    let resources = of(&case);
    assert_eq!(
        json(&resources),
        serde_json::json!({
            "cpu": {"period": 100_000, "quota": 50_000, "shares": 512, "cpus": "0-1,3", "mems": "0"},
            "memory": {"limit": 1 << 30, "swap": 2_i64 << 30},
            "hugepageLimits": [{"pageSize": "2MB", "limit": 4 << 20}],
            "unified": {"memory.high": "900"},
        })
    );
    // The inverse gives the request back.
    let mut case = case;
    assert_eq!(reported_resources(&resources, None), *case.resources());
}

#[test]
fn bounds_of_values() {
    for (asked, shares) in [(1, 2), (2, 2), (262_144, 262_144), (i64::MAX, 262_144)] {
        let resources = of(&with(|request| request.cpu_shares = asked));
        assert_eq!(resources.cpu().as_ref().unwrap().shares(), Some(shares));
    }
    let unlimited = of(&with(|request| {
        request.cpu_quota = -1;
        request.memory_limit_in_bytes = -1;
    }));
    assert_eq!(
        json(&unlimited),
        serde_json::json!({"cpu": {"quota": -1}, "memory": {"limit": -1, "swap": -1}})
    );
}

#[test]
fn swap() {
    let limit = |change: &dyn Fn(&mut Case)| {
        let mut case = with(|request| request.memory_limit_in_bytes = 100);
        change(&mut case);
        of(&case).memory().unwrap().swap()
    };
    // No swap unless asked for; nothing where it cannot be limited.
    assert_eq!(limit(&|_| {}), Some(100));
    assert_eq!(limit(&|case| case.resources().memory_swap_limit_in_bytes = 150), Some(150));
    assert_eq!(limit(&|case| case.resources().memory_swap_limit_in_bytes = -1), Some(-1));
    assert_eq!(limit(&|case| case.host.swap = false), None);
    assert_eq!(
        limit(&|case| {
            case.resources().unified = [("memory.swap.max".to_owned(), "7".to_owned())].into();
        }),
        None
    );
}

#[test]
fn pids() {
    let limit = |case: &Case| of(case).pids().map(|pids| pids.limit());
    assert_eq!(limit(&Case::default()), None);
    assert_eq!(limit(&Case::with(|case| case.default_pids = Some(99))), Some(99));
    let own = Case::with(|case| {
        case.default_pids = Some(99);
        case.resources().unified = [("pids.max".to_owned(), "7".to_owned())].into();
    });
    assert_eq!(limit(&own), None);
}

#[test]
fn hugepages_are_left_out_where_nothing_limits_them() {
    let case = Case::with(|case| {
        case.host.hugetlb = false;
        case.resources().hugepage_limits = vec![cri::HugepageLimit { page_size: "1GB".to_owned(), limit: 0 }];
    });
    assert_eq!(of(&case).hugepage_limits(), &None);
}

#[test]
fn oom_score() {
    for (asked, floor, expected) in [
        (-997, None, -997),
        (-997, Some(0), 0),
        (-997, Some(-500), -500),
        (1000, Some(0), 1000),
        (0, Some(-999), 0),
    ] {
        let case = Case::with(|case| {
            case.host.oom_score_adj_floor = floor;
            case.resources().oom_score_adj = asked;
        });
        assert_eq!(case.process().oom_score_adj(), Some(expected));
    }
}

#[test]
fn refused() {
    let unified = |key: &str, value: &str| {
        let pair = (key.to_owned(), value.to_owned());
        with(|request| request.unified = [pair].into())
    };
    let page = |size: &str, limit| {
        let limits = vec![cri::HugepageLimit { page_size: size.to_owned(), limit }];
        with(|request| request.hugepage_limits = limits)
    };
    #[rustfmt::skip]
    let table = [
        (with(|request| request.cpu_period = 999), "cpu_period"),
        (with(|request| request.cpu_period = -1), "cpu_period"),
        (with(|request| request.cpu_quota = 999), "cpu_quota"),
        (with(|request| request.cpu_quota = -2), "cpu_quota"),
        (with(|request| request.cpu_shares = -1), "cpu_shares"),
        (with(|request| request.cpuset_cpus = "0;1".into()), "cpuset_cpus"),
        (with(|request| request.cpuset_cpus = "+1".into()), "cpuset_cpus"),
        (with(|request| request.cpuset_cpus = "3-1".into()), "cpuset_cpus"),
        (with(|request| request.cpuset_mems = "0,".into()), "cpuset_mems"),
        (with(|request| request.cpuset_cpus = "0-8".into()), "cpuset_cpus"),
        (with(|request| request.cpuset_mems = "2".into()), "cpuset_mems"),
        (with(|request| request.memory_limit_in_bytes = -2), "memory_limit_in_bytes"),
        (with(|request| request.memory_swap_limit_in_bytes = 5), "memory_swap_limit_in_bytes"),
        (with(|request| { request.memory_limit_in_bytes = 9; request.memory_swap_limit_in_bytes = 5; }),
         "memory_swap_limit_in_bytes"),
        (with(|request| request.oom_score_adj = 1001), "oom_score_adj"),
        (with(|request| request.oom_score_adj = i64::MIN), "oom_score_adj"),
        (page("2M", 0), "hugepage_limits[0].page_size"),
        (page("MB", 0), "hugepage_limits[0].page_size"),
        (page("16MB", 0), "hugepage_limits[0].page_size"),
        (page("2MB", u64::MAX), "hugepage_limits[0].limit"),
        (unified("../x.y", "1"), "unified[\"../x.y\"]"),
        (unified("memory", "1"), "unified[\"memory\"]"),
        (unified(".max", "1"), "unified[\".max\"]"),
        (unified("cgroup.kill", "1"), "unified[\"cgroup.kill\"]"),
        (unified("memory.max", "1\0"), "unified[\"memory.max\"]"),
    ];
    for (case, field) in table {
        assert_eq!(case.refused(), (ErrorKind::Invalid, format!("config.linux.resources.{field}")));
    }
    let mut old = unified("memory.max", "1");
    old.host.cgroup_v2 = false;
    assert_eq!(old.refused(), (ErrorKind::Unsupported, "config.linux.resources.unified".to_owned()));
}

#[test]
fn a_refused_update_is_taken_back() {
    let current = of(&with(|request| {
        request.cpu_shares = 512;
        request.memory_limit_in_bytes = 100;
        request.unified = [("memory.low".to_owned(), "1".to_owned())].into();
    }));
    let refused = cri::LinuxContainerResources {
        cpu_shares: 600,
        cpu_quota: 70_000,
        cpu_period: 50_000,
        memory_limit_in_bytes: 200,
        hugepage_limits: vec![cri::HugepageLimit { page_size: "2MB".to_owned(), limit: 2 }],
        unified: [
            ("memory.high", "90"),
            ("memory.low", "2"),
            ("memory.max", "9"),
            ("io.max", "x"),
            ("hugetlb.2MB.max", "5"),
        ]
        .map(|(key, value)| (key.to_owned(), value.to_owned()))
        .into(),
        ..Default::default()
    };
    let refused = resources(&current, &refused, &Case::default().host).unwrap();
    assert_eq!(
        json(&taken_back(&current, &refused)),
        serde_json::json!({
            // Not named before: what the kernel has without a limit.
            "cpu": {"shares": 512, "quota": -1, "period": 100_000},
            "memory": {"limit": 100, "swap": 100},
            "hugepageLimits": [{"pageSize": "2MB", "limit": i64::MAX}],
            // memory.max is the memory limit's; io.max has no content that is none.
            "unified": {"memory.high": "max", "memory.low": "1", "hugetlb.2MB.max": "max"},
        })
    );
    let none = of(&Case::default());
    assert_eq!(json(&taken_back(&none, &refused))["memory"], serde_json::json!({"limit": -1, "swap": -1}),);
    assert_eq!(taken_back(&current, &current), current);
}

#[test]
fn update_merges() {
    let host = Case::default().host;
    let current = of(&with(|request| {
        request.cpu_shares = 512;
        request.cpu_quota = 50_000;
        request.memory_limit_in_bytes = 100;
        request.hugepage_limits = vec![cri::HugepageLimit { page_size: "2MB".to_owned(), limit: 1 }];
        request.unified =
            [("memory.high".to_owned(), "90".to_owned()), ("memory.low".to_owned(), "1".to_owned())].into();
    }));
    assert_eq!(resources(&current, &cri::LinuxContainerResources::default(), &host).unwrap(), current);

    let update = cri::LinuxContainerResources {
        cpu_quota: 70_000,
        memory_limit_in_bytes: 200,
        hugepage_limits: vec![
            cri::HugepageLimit { page_size: "2MB".to_owned(), limit: 2 },
            cri::HugepageLimit { page_size: "1GB".to_owned(), limit: 3 },
        ],
        unified: [("memory.high".to_owned(), "190".to_owned())].into(),
        ..Default::default()
    };
    let merged = resources(&current, &update, &host).unwrap();
    assert_eq!(
        json(&merged),
        serde_json::json!({
            "cpu": {"quota": 70_000, "shares": 512},
            "memory": {"limit": 200, "swap": 200},
            "hugepageLimits": [{"pageSize": "2MB", "limit": 2}, {"pageSize": "1GB", "limit": 3}],
            "unified": {"memory.high": "190", "memory.low": "1"},
        })
    );
    assert_eq!(merged.devices(), current.devices());

    // The new swap limit is held against the limit that stays.
    let bad = cri::LinuxContainerResources { memory_swap_limit_in_bytes: 50, ..Default::default() };
    let error = resources(&current, &bad, &host).unwrap_err();
    assert_eq!(field_of(&error), "linux.memory_swap_limit_in_bytes");
    // It cannot be applied to what runs, so it changes nothing; but nonsense is named.
    let same = cri::LinuxContainerResources { oom_score_adj: -997, ..Default::default() };
    assert_eq!(resources(&current, &same, &host).unwrap(), current);
    let bad = cri::LinuxContainerResources { oom_score_adj: 1001, ..Default::default() };
    assert_eq!(field_of(&resources(&current, &bad, &host).unwrap_err()), "linux.oom_score_adj");
}

/// What kubelet asks for by `unified`: memory QoS (KEP-2570), swap (KEP-2400), the end of all processes at once, from creation through
/// updates that each name only a part.
#[test]
fn unified_is_merged_from_the_first_to_the_last() {
    let of_update = |entries: &[(&str, &str)]| cri::LinuxContainerResources {
        unified: entries.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect(),
        ..Default::default()
    };
    let created = Case::with(|case| {
        case.resources().memory_limit_in_bytes = 1000;
        case.resources().unified = of_update(&[
            ("memory.oom.group", "1"),
            ("memory.swap.max", "300"),
            ("memory.high", "900"),
            ("memory.min", "0"),
        ])
        .unified;
    });
    let mut in_force = of(&created);
    // The limit of swap is the file's, not what follows from the limit of memory.
    assert_eq!(in_force.memory().unwrap().swap(), None);
    let host = &created.host;
    in_force = resources(&in_force, &of_update(&[("memory.high", "max")]), host).unwrap();
    let smaller = cri::LinuxContainerResources { memory_limit_in_bytes: 500, ..Default::default() };
    in_force = resources(&in_force, &smaller, host).unwrap();
    in_force = resources(&in_force, &of_update(&[("memory.swap.max", "0")]), host).unwrap();
    let memory = in_force.memory().unwrap();
    assert_eq!((memory.limit(), memory.swap()), (Some(500), None));
    let unified = in_force.unified().clone().unwrap();
    let mut unified: Vec<_> = unified.iter().map(|(key, value)| (key.as_str(), value.as_str())).collect();
    unified.sort_unstable();
    let expected =
        [("memory.high", "max"), ("memory.min", "0"), ("memory.oom.group", "1"), ("memory.swap.max", "0")];
    assert_eq!(unified, expected);
    // What the status says is what the next update starts from.
    assert_eq!(reported_resources(&in_force, None).unified["memory.oom.group"], "1");
}
