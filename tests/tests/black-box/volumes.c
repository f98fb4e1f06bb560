// What programs do with volumes, for containers of tests. Static, so that it runs in every image.
//
//   hold FILE    locks it (flock, fcntl) and maps it shared; says A in byte 0; when another has said B in byte 1, says C in byte 0; ends,
//                and with it the locks, when byte 2 is set
//   try FILE     says which of the locks it gets, and byte 0; with "answer" says B in byte 1 and waits until byte 0 is C
//   watch DIR LIMIT   watches a directory, what its ..data leads to and the file `value` through it; tells the events until the directory's
//                ..data has been exchanged and both others have gone; fails after LIMIT seconds
//   huge FILE MIB   fills so many MiB of huge pages, a file's or, for -, its own; says the sum of what the pages begin with, 1 in each
//   compare DIR UNTIL   reads the files `one` and `two` of versions of DIR until they hold UNTIL, and tells of a version in which they differ
//   attributes FILE   says each extended attribute's name and, in hexadecimal digits, value
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/inotify.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/xattr.h>
#include <time.h>
#include <unistd.h>

static int failed(const char *what) {
    perror(what);
    return 1;
}

static void rest(void) {
    nanosleep(&(struct timespec){.tv_nsec = 5000000}, NULL);
}

static int hold(const char *path) {
    int file = open(path, O_RDWR | O_CREAT, 0666);
    if (file < 0 || ftruncate(file, 4096) < 0) return failed(path);
    struct flock whole = {.l_type = F_WRLCK, .l_whence = SEEK_SET};
    if (flock(file, LOCK_EX | LOCK_NB) < 0 || fcntl(file, F_SETLK, &whole) < 0) return failed("lock");
    volatile char *map = mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
    if (map == MAP_FAILED) return failed("mmap");
    map[0] = 'A';
    while (map[1] != 'B') rest();
    map[0] = 'C';
    while (!map[2]) rest();
    return 0;
}

static int try(const char *path, int answer) {
    int file = open(path, O_RDWR);
    int reads = file < 0;
    if (reads) file = open(path, O_RDONLY);
    if (file < 0) return failed(path);
    struct flock whole = {.l_type = reads ? F_RDLCK : F_WRLCK, .l_whence = SEEK_SET};
    const char *first = flock(file, LOCK_EX | LOCK_NB) == 0 ? "got" : "refused";
    const char *second = fcntl(file, F_SETLK, &whole) == 0 ? "got" : "refused";
    volatile char *map = mmap(NULL, 4096, reads ? PROT_READ : PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
    if (map == MAP_FAILED) return failed("mmap");
    printf("%s %s %s %c\n", reads ? "ro" : "rw", first, second, map[0]);
    if (answer) {
        map[1] = 'B';
        while (map[0] != 'C') rest();
    }
    return 0;
}

static int watch(const char *directory, int limit) {
    char data[4096], value[4096];
    snprintf(data, sizeof data, "%s/..data", directory);
    snprintf(value, sizeof value, "%s/value", directory);
    int events = inotify_init1(IN_NONBLOCK);
    int whole = inotify_add_watch(events, directory, IN_MOVED_TO | IN_CREATE | IN_DELETE);
    int version = inotify_add_watch(events, data, IN_DELETE_SELF);
    int file = inotify_add_watch(events, value, IN_DELETE_SELF);
    if (whole < 0 || version < 0 || file < 0) return failed("watch");
    printf("watching\n");
    fflush(stdout);
    int left = 1 << whole | 1 << version | 1 << file;
    time_t until = time(NULL) + limit;
    while (left && time(NULL) < until) {
        char buffer[8192] __attribute__((aligned(8)));
        poll(&(struct pollfd){.fd = events, .events = POLLIN}, 1, 500);
        ssize_t length = read(events, buffer, sizeof buffer);
        for (char *at = buffer; length > 0 && at < buffer + length;) {
            struct inotify_event *event = (struct inotify_event *)at;
            if (event->wd == whole && event->mask & IN_MOVED_TO && !strcmp(event->name, "..data")) left &= ~(1 << whole);
            if (event->mask & IN_DELETE_SELF) left &= ~(1 << event->wd);
            at += sizeof *event + event->len;
        }
    }
    printf(left ? "not woken\n" : "woken\n");
    return left != 0;
}

static int content(int directory, const char *name, char text[64]) {
    int file = openat(directory, name, O_RDONLY);
    if (file < 0) return -1;
    ssize_t length = read(file, text, 63);
    close(file);
    if (length < 0) return -1;
    text[length] = 0;
    return 0;
}

static int compare(const char *directory, const char *until) {
    char data[4096], one[64] = "", two[64];
    snprintf(data, sizeof data, "%s/..data", directory);
    while (strcmp(one, until)) {
        int version = open(data, O_RDONLY | O_DIRECTORY);
        // What the link led to may have gone when it is come to, and go while it is read; but it is never half there.
        if (version < 0 && errno == ENOENT) continue;
        if (version < 0) return failed(data);
        if (!content(version, "one", one) && !content(version, "two", two) && strcmp(one, two)) {
            printf("%s and %s\n", one, two);
            return 1;
        }
        close(version);
    }
    printf("always whole\n");
    return 0;
}

static int huge(const char *path, size_t mib) {
    const size_t page = 2 << 20, size = mib << 20;
    int own = !strcmp(path, "-");
    int file = own ? -1 : open(path, O_RDWR | O_CREAT, 0644);
    if (!own && file < 0) return failed(path);
    int flags = own ? MAP_PRIVATE | MAP_ANONYMOUS | MAP_HUGETLB : MAP_SHARED;
    char *pages = mmap(NULL, size, PROT_READ | PROT_WRITE, flags, file, 0);
    if (pages == MAP_FAILED) return failed("mmap");
    size_t sum = 0;
    for (size_t at = 0; at < size; at += page) sum += pages[at] = 1;
    printf("%zu\n", sum);
    return 0;
}

static int attributes(const char *path) {
    char names[4096], value[4096];
    ssize_t length = llistxattr(path, names, sizeof names);
    if (length < 0) return failed(path);
    for (char *name = names; name < names + length; name += strlen(name) + 1) {
        ssize_t bytes = lgetxattr(path, name, value, sizeof value);
        if (bytes < 0) return failed(name);
        printf("%s %s ", path, name);
        for (ssize_t at = 0; at < bytes; at++) printf("%02hhx", (unsigned char)value[at]);
        putchar('\n');
    }
    return 0;
}

int main(int count, char **words) {
    if (count >= 3 && !strcmp(words[1], "hold")) return hold(words[2]);
    if (count >= 3 && !strcmp(words[1], "try")) return try(words[2], count > 3);
    if (count >= 4 && !strcmp(words[1], "watch")) return watch(words[2], atoi(words[3]));
    if (count >= 4 && !strcmp(words[1], "huge")) return huge(words[2], strtoul(words[3], NULL, 10));
    if (count >= 4 && !strcmp(words[1], "compare")) return compare(words[2], words[3]);
    if (count >= 3 && !strcmp(words[1], "attributes")) return attributes(words[2]);
    return 2;
}
