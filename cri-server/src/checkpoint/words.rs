//! CRIU's own words: the errors in its log, of which the first is the cause and the rest what came of it.

/// Bytes.
const ENOUGH: usize = 1024;

/// Lines `(00.012345) Error (criu/file.c:123): what is wrong`, without what is before it; empty: there is none.
pub(super) fn errors(log: &[u8]) -> String {
    let text = String::from_utf8_lossy(log);
    let mut said = String::new();
    for line in text.lines() {
        let Some((_, error)) = line.split_once("Error (") else { continue };
        let error = error.split_once("): ").map_or(error, |(_, error)| error).trim();
        if said.len() + error.len() > ENOUGH {
            break;
        }
        if !said.is_empty() {
            said.push_str("; ");
        }
        said.push_str(error);
    }
    said
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_errors_and_not_where_they_are() {
        let log = b"(00.000001) Version: 3.17.1\n(00.011) Error (criu/files.c:1): Can't lookup mount=32 for fd=1\n\
                    (00.012) ----\n(00.013) pie: 1: Error (criu/x.c:2): Dump files (pid: 259) failed with -1\n\
                    Warn  (criu/y.c:3): nothing\n";
        assert_eq!(errors(log), "Can't lookup mount=32 for fd=1; Dump files (pid: 259) failed with -1");
        assert_eq!(errors(b""), "");
        let long = "(1) Error (a.c:1): ".to_owned() + &"x".repeat(600) + "\n";
        assert_eq!(errors(long.repeat(3).as_bytes()).len(), 600);
    }
}
