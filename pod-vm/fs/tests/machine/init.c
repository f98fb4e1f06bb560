/* The first process of the tests' guests: loads the modules, then does what the host types on its console, one command a line.
 * Every line that answers begins with "> "; the last one of an answer is "> ok ..." or "> error NAME".
 * Its note says which protocol an agent speaks; here 7, which is none of podvisor-agent's. */
#define _GNU_SOURCE
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <grp.h>
#include <linux/fs.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/mount.h>
#include <sys/reboot.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/statfs.h>
#include <sys/syscall.h>
#include <sys/sysmacros.h>
#include <sys/un.h>
#include <sys/utsname.h>
#include <sys/wait.h>
#include <sys/xattr.h>
#include <termios.h>
#include <time.h>
#include <unistd.h>

__asm__(".pushsection .note.podvisor,\"a\",@note\n"
        ".balign 4\n .long 9, 4, 1\n .asciz \"podvisor\"\n .balign 4\n .long 7\n"
        ".popsection\n");

#define CHUNK (1 << 20)
static char text[CHUNK + 4096];   /* what a command answers */
static char chunk[CHUNK] __attribute__((aligned(4096)));
static int held[20000], holding;

static long microseconds(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return now.tv_sec * 1000000 + now.tv_nsec / 1000;
}

static void load_modules(void) {
    char line[4096];
    FILE *list = fopen("/modules", "r");
    while (list && fgets(line, sizeof line, list)) {
        char *when = strtok(line, " \n"), *name = strtok(NULL, " \n"), path[128];
        if (!when || !name || strcmp(when, "start") != 0) continue;
        snprintf(path, sizeof path, "/lib/modules/%s.ko", name);
        int file = open(path, O_RDONLY | O_CLOEXEC);
        if (file >= 0) { syscall(SYS_finit_module, file, "", 0); close(file); }
    }
    if (list) fclose(list);
}

/* Closes, and says whether what was done with it went well. */
static int closed(int file, int outcome) {
    int why = errno;
    int late = close(file);
    if (outcome >= 0 && late < 0) return -1;
    errno = why;
    return outcome < 0 ? -1 : 0;
}

static int write_to(const char *path, int flags, const char *what) {
    int file = open(path, O_WRONLY | O_CLOEXEC | flags, 0666);
    if (file < 0) return -1;
    ssize_t length = strlen(what);
    return closed(file, write(file, what, length) == length ? 0 : -1);
}

static int read_from(const char *path, int flags) {
    int file = open(path, O_RDONLY | O_CLOEXEC | flags);
    if (file < 0) return -1;
    ssize_t length = read(file, chunk, 4096);
    if (length >= 0) snprintf(text, sizeof text, "%.*s", (int)length, chunk);
    return closed(file, length < 0 ? -1 : 0);
}

static int say_status(const char *path) {
    struct stat s;
    if (lstat(path, &s) < 0) return -1;
    snprintf(text, sizeof text, "%o %u %u %lld %u", s.st_mode, s.st_uid, s.st_gid, (long long)s.st_size, (unsigned)s.st_nlink);
    return 0;
}

/* Device and inode number: what programs tell files apart by. */
static int say_identity(const char *path) {
    struct stat s;
    if (lstat(path, &s) < 0) return -1;
    snprintf(text, sizeof text, "%u:%u %llu", major(s.st_dev), minor(s.st_dev), (unsigned long long)s.st_ino);
    return 0;
}

static int say_names(const char *path) {
    struct dirent **entries;
    int count = scandir(path, &entries, NULL, alphasort);
    if (count < 0) return -1;
    for (int at = 0; at < count; at++) {
        if (strcmp(entries[at]->d_name, ".") == 0 || strcmp(entries[at]->d_name, "..") == 0) continue;
        strcat(text, text[0] ? " " : "");
        strcat(text, entries[at]->d_name);
    }
    return 0;
}

/* What chattr(1) does, without a change. */
static int same_flags(const char *path) {
    int flags = 0, file = open(path, O_RDONLY | O_CLOEXEC);
    if (file < 0) return -1;
    return closed(file, ioctl(file, FS_IOC_GETFLAGS, &flags));
}

static int without_name(const char *directory) {
    int file = open(directory, O_RDWR | O_TMPFILE | O_CLOEXEC, 0600);
    return file < 0 ? -1 : closed(file, 0);
}

static int from_hex(const char *hex, unsigned char *bytes) {
    int count = strlen(hex) / 2;
    for (int at = 0; at < count; at++) {
        unsigned value;
        sscanf(hex + 2 * at, "%2x", &value);
        bytes[at] = value;
    }
    return count;
}

static int set_attribute(const char *path, const char *name, const char *hex) {
    unsigned char bytes[256];
    return lsetxattr(path, name, bytes, from_hex(hex, bytes), 0);
}

static int say_attribute(const char *path, const char *name) {
    unsigned char bytes[256];
    ssize_t length = lgetxattr(path, name, bytes, sizeof bytes);
    for (ssize_t at = 0; at < length; at++) sprintf(text + 2 * at, "%02x", bytes[at]);
    return length < 0 ? -1 : 0;
}

static int say_attributes(const char *path) {
    ssize_t length = llistxattr(path, chunk, sizeof chunk);
    for (ssize_t at = 0; at < length; at += strlen(chunk + at) + 1) {
        strcat(text, text[0] ? " " : "");
        strcat(text, chunk + at);
    }
    return length < 0 ? -1 : 0;
}

/* Two processes that each open and map the file: what one writes the other sees, and so does read(2). */
static int share_memory(const char *path) {
    int file = open(path, O_RDWR | O_CREAT | O_CLOEXEC, 0666);
    if (file < 0 || ftruncate(file, 8192) < 0) return -1;
    char *mine = mmap(NULL, 8192, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
    if (mine == MAP_FAILED) return -1;
    strcpy(mine, "parent");
    pid_t child = fork();
    if (child == 0) {
        int own = open(path, O_RDWR | O_CLOEXEC);
        char *theirs = mmap(NULL, 8192, PROT_READ | PROT_WRITE, MAP_SHARED, own, 0);
        if (own < 0 || theirs == MAP_FAILED || strcmp(theirs, "parent") != 0) _exit(1);
        strcpy(theirs + 4096, "child");
        _exit(0);
    }
    int status = 1;
    waitpid(child, &status, 0);
    char seen[16] = "";
    if (pread(file, seen, 6, 4096) < 0 || msync(mine, 8192, MS_SYNC) < 0) return -1;
    snprintf(text, sizeof text, "%d %s %s", status, mine + 4096, seen);
    munmap(mine, 8192);
    return closed(file, 0);
}

/* A process holds locks of both kinds; another one gets neither. */
static int share_locks(const char *path) {
    int file = open(path, O_RDWR | O_CREAT | O_CLOEXEC, 0666);
    struct flock whole = {.l_type = F_WRLCK, .l_whence = SEEK_SET};
    if (file < 0 || flock(file, LOCK_EX | LOCK_NB) < 0 || fcntl(file, F_SETLK, &whole) < 0) return -1;
    pid_t child = fork();
    if (child == 0) {
        int own = open(path, O_RDWR | O_CLOEXEC);
        _exit((flock(own, LOCK_EX | LOCK_NB) == 0) + 2 * (fcntl(own, F_SETLK, &whole) == 0));
    }
    int status = -1;
    waitpid(child, &status, 0);
    snprintf(text, sizeof text, "%d", WEXITSTATUS(status));
    return closed(file, 0);
}

static int over_socket(const char *path, int listens) {
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    strncpy(address.sun_path, path, sizeof address.sun_path - 1);
    int s = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
    int outcome = listens ? bind(s, (struct sockaddr *)&address, sizeof address) : connect(s, (struct sockaddr *)&address, sizeof address);
    return closed(s, outcome);
}

/* Byte AT of a large file. */
static void pattern(long long at) {
    for (int word = 0; word < CHUNK / 8; word++) ((uint64_t *)chunk)[word] = (at + word * 8) * 0x9e3779b97f4a7c15ull;
}

static int fill(const char *path, int mebibytes, int size, int flags) {
    int file = open(path, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC | flags, 0666);
    if (file < 0) return -1;
    long spent = 0;
    for (long long at = 0; at < (long long)mebibytes * CHUNK; at += CHUNK) {
        pattern(at);
        long before = microseconds();
        for (int done = 0; done < CHUNK; done += size)
            if (write(file, chunk + done, size) != size) return closed(file, -1);
        spent += microseconds() - before;
    }
    int outcome = fsync(file);
    snprintf(text, sizeof text, "%ld", spent);
    return closed(file, outcome);
}

static int check(const char *path, int size, int flags) {
    static char expected[CHUNK] __attribute__((aligned(4096)));
    int file = open(path, O_RDONLY | O_CLOEXEC | flags), wrong = 0;
    if (file < 0) return -1;
    long spent = 0;
    for (long long at = 0;; at += CHUNK) {
        ssize_t got = 0, last = 1;
        long before = microseconds();
        for (; got < CHUNK && last > 0; got += last)
            if ((last = read(file, expected + got, size)) < 0) return closed(file, -1);
        spent += microseconds() - before;
        if (got == 0) break;
        pattern(at);
        wrong += memcmp(expected, chunk, got) != 0;
    }
    snprintf(text, sizeof text, "%ld %d", spent, wrong);
    return closed(file, 0);
}

/* COUNT files in directories of at most 1000; then what a walk over them takes. */
static int populate(const char *directory, int count) {
    char path[512];
    for (int at = 0; at < count; at++) {
        if (at % 1000 == 0) {
            snprintf(path, sizeof path, "%s/%d", directory, at / 1000);
            if (mkdir(path, 0777) < 0) return -1;
        }
        snprintf(path, sizeof path, "%s/%d/%d", directory, at / 1000, at);
        int file = open(path, O_WRONLY | O_CREAT | O_CLOEXEC, 0666);
        if (file < 0) return -1;
        close(file);
    }
    return 0;
}

static int walk(int at, int hold, long *count) {
    DIR *directory = fdopendir(at);
    struct dirent *entry;
    if (!directory) return -1;
    while ((entry = readdir(directory))) {
        struct stat s;
        if (entry->d_name[0] == '.') continue;
        int file = openat(dirfd(directory), entry->d_name, O_PATH | O_NOFOLLOW | O_CLOEXEC);
        if (file < 0 || fstat(file, &s) < 0) return -1;
        ++*count;
        if (S_ISDIR(s.st_mode)) {
            int inside = openat(dirfd(directory), entry->d_name, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
            if (inside < 0 || walk(inside, hold, count) < 0) return -1;
        }
        if (hold && !S_ISDIR(s.st_mode)) held[holding++] = file; else close(file);
    }
    return closedir(directory);
}

static int walk_from(const char *path, int hold) {
    long count = 0, began = microseconds();
    int at = open(path, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    if (at < 0 || walk(at, hold, &count) < 0) return -1;
    snprintf(text, sizeof text, "%ld %ld", count, microseconds() - began);
    return 0;
}

static int release(void) {
    while (holding > 0) close(held[--holding]);
    return 0;
}

/* How often PATH is a mount point, and of which type. */
static int say_mounts(const char *path) {
    char line[4096];
    FILE *list = fopen("/proc/self/mounts", "r");
    if (!list) return -1;
    while (fgets(line, sizeof line, list)) {
        strtok(line, " ");
        char *at = strtok(NULL, " "), *type = strtok(NULL, " ");
        if (at && type && strcmp(at, path) == 0) { strcat(text, text[0] ? " " : ""); strcat(text, type); }
    }
    fclose(list);
    return 0;
}

static int say_space(const char *path) {
    struct statfs s;
    if (statfs(path, &s) < 0) return -1;
    snprintf(text, sizeof text, "%lld", (long long)s.f_blocks * s.f_bsize);
    return 0;
}

static int command(int count, char **word);

/* The rest of the command as another user, in another process. */
static int as(int count, char **word) {
    pid_t child = fork();
    if (child == 0) {
        gid_t groups[1] = {atoi(word[3])};
        if (setgroups(1, groups) < 0 || setresgid(atoi(word[2]), atoi(word[2]), atoi(word[2])) < 0
            || setresuid(atoi(word[1]), atoi(word[1]), atoi(word[1])) < 0) _exit(1);
        exit(command(count - 4, word + 4));
    }
    int status;
    waitpid(child, &status, 0);
    return 1;
}

static int perform(int count, char **word) {
#define IS(name, words) (strcmp(word[0], name) == 0 && count == (words) + 1)
    if (IS("mount", 2)) return mount(word[1], word[2], "virtiofs", 0, NULL);
    if (IS("umount", 1)) return umount(word[1]);
    if (IS("mounts", 1)) return say_mounts(word[1]);
    if (IS("space", 1)) return say_space(word[1]);
    if (IS("write", 2)) return write_to(word[1], O_CREAT | O_TRUNC, word[2]);
    if (IS("append", 2)) return write_to(word[1], O_APPEND, word[2]);
    if (IS("read", 1)) return read_from(word[1], 0);
    if (IS("stat", 1)) return say_status(word[1]);
    if (IS("identity", 1)) return say_identity(word[1]);
    if (IS("list", 1)) return say_names(word[1]);
    if (IS("mkdir", 1)) return mkdir(word[1], 0777);
    if (IS("rmdir", 1)) return rmdir(word[1]);
    if (IS("unlink", 1)) return unlink(word[1]);
    if (IS("chdir", 1)) return chdir(word[1]);
    if (IS("truncate", 2)) return truncate(word[1], atoll(word[2]));
    if (IS("chmod", 2)) return chmod(word[1], strtol(word[2], NULL, 8));
    if (IS("chown", 3)) return lchown(word[1], atoi(word[2]), atoi(word[3]));
    if (IS("rename", 2)) return rename(word[1], word[2]);
    if (IS("exchange", 2)) return renameat2(AT_FDCWD, word[1], AT_FDCWD, word[2], RENAME_EXCHANGE);
    if (IS("link", 2)) return link(word[1], word[2]);
    if (IS("symlink", 2)) return symlink(word[1], word[2]);
    if (IS("device", 1)) return mknod(word[1], S_IFCHR | 0600, makedev(1, 3));
    if (IS("whiteout", 1)) return mknod(word[1], S_IFCHR, makedev(0, 0));
    if (IS("same-flags", 1)) return same_flags(word[1]);
    if (IS("without-name", 1)) return without_name(word[1]);
    if (IS("fifo", 1)) return mkfifo(word[1], 0600);
    if (IS("open-device", 1)) return read_from(word[1], O_NONBLOCK);
    if (IS("set", 3)) return set_attribute(word[1], word[2], word[3]);
    if (IS("get", 2)) return say_attribute(word[1], word[2]);
    if (IS("remove", 2)) return lremovexattr(word[1], word[2]);
    if (IS("attributes", 1)) return say_attributes(word[1]);
    if (IS("share-memory", 1)) return share_memory(word[1]);
    if (IS("share-locks", 1)) return share_locks(word[1]);
    if (IS("bind", 1)) return over_socket(word[1], 1);
    if (IS("connect", 1)) return over_socket(word[1], 0);
    if (IS("fill", 3)) return fill(word[1], atoi(word[2]), atoi(word[3]), 0);
    if (IS("fill-direct", 3)) return fill(word[1], atoi(word[2]), atoi(word[3]), O_DIRECT);
    if (IS("check", 2)) return check(word[1], atoi(word[2]), 0);
    if (IS("check-direct", 2)) return check(word[1], atoi(word[2]), O_DIRECT);
    if (IS("populate", 2)) return populate(word[1], atoi(word[2]));
    if (IS("walk", 1)) return walk_from(word[1], 0);
    if (IS("hold", 1)) return walk_from(word[1], 1);
    if (IS("release", 0)) return release();
    errno = ENOTSUP;
    return -1;
}

static int command(int count, char **word) {
    if (count > 4 && strcmp(word[0], "as") == 0) return as(count, word);
    text[0] = 0;
    errno = 0;
    int failed = perform(count, word) < 0;
    if (failed) printf("> error %s\n", strerrorname_np(errno)); else printf("> ok %s\n", text);
    fflush(stdout);
    return failed;
}

int main(void) {
    struct utsname name;
    struct termios terminal;
    char line[4096], *word[16];
    setvbuf(stdout, NULL, _IOLBF, 0);
    umask(0022);
    setrlimit(RLIMIT_NOFILE, &(struct rlimit){30000, 30000});
    mount("proc", "/proc", "proc", 0, NULL);
    load_modules();
    mkdir("/share", 0755);
    tcgetattr(0, &terminal);
    terminal.c_lflag &= ~ECHO;
    tcsetattr(0, TCSANOW, &terminal);
    uname(&name);
    printf("> ok %s\n", name.release);
    while (fgets(line, sizeof line, stdin)) {
        int count = 0;
        for (char *next = strtok(line, " \n"); next && count < 16; next = strtok(NULL, " \n")) word[count++] = next;
        if (count > 0) command(count, word);
    }
    reboot(RB_AUTOBOOT);
    return 1;
}
