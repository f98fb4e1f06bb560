/* In QEMU's place: says on stderr what it can do. */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/ptrace.h>
#include <sys/socket.h>
#include <unistd.h>

static void say(const char *what, int failed) {
    fprintf(stderr, "%s: %s\n", what, failed < 0 ? strerror(errno) : "possible");
}

int main(void) {
    struct sockaddr_in host = { .sin_family = AF_INET, .sin_port = htons(PORT), .sin_addr.s_addr = htonl(INADDR_LOOPBACK) };
    say("read /etc/passwd", open("/etc/passwd", O_RDONLY));
    say("list /", open("/", O_RDONLY | O_DIRECTORY));
    say("list /proc", open("/proc", O_RDONLY | O_DIRECTORY));
    say("write /tmp/prisoner", open("/tmp/prisoner", O_WRONLY | O_CREAT, 0600));
    say("read /usr/bin/env", open("/usr/bin/env", O_RDONLY));
    say("connect to the host", connect(socket(AF_INET, SOCK_STREAM, 0), (struct sockaddr *)&host, sizeof host));
    say("become root", setuid(0));
    say("mount", mount("none", "/tmp", "tmpfs", 0, NULL));
    say("trace the parent", ptrace(PTRACE_ATTACH, getppid(), NULL, NULL));
    return 1;
}
