/* The first process of the guests: mounts the image that is there as a disk and, with DAX, as a pmem device, and says what it sees of every
 * file in both. Its note says which protocol an agent speaks; here 7, which is none of podvisor-agent's. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <ftw.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/reboot.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/xattr.h>
#include <termios.h>
#include <unistd.h>

__asm__(".pushsection .note.podvisor,\"a\",@note\n"
        ".balign 4\n .long 9, 4, 1\n .asciz \"podvisor\"\n .balign 4\n .long 7\n"
        ".popsection\n");

static char buffer[1 << 16], value[1 << 16];
static const char *device;

/* FNV-1a */
static uint64_t hash(uint64_t state, const char *bytes, size_t length) {
    for (size_t at = 0; at < length; at++) state = (state ^ (unsigned char)bytes[at]) * 0x100000001b3u;
    return state;
}

static uint64_t content(const char *path, const struct stat *stat) {
    uint64_t state = 0xcbf29ce484222325u;
    if (S_ISLNK(stat->st_mode)) {
        ssize_t length = readlink(path, buffer, sizeof buffer);
        return length < 0 ? 1 : hash(state, buffer, length);
    }
    if (!S_ISREG(stat->st_mode)) return 0;
    int file = open(path, O_RDONLY | O_CLOEXEC);
    for (ssize_t length; (length = read(file, buffer, sizeof buffer)) != 0;) {
        if (length < 0) { printf("test: cannot read %s: %s\n", path, strerror(errno)); return 1; }
        state = hash(state, buffer, length);
    }
    close(file);
    return state;
}

/* In whatever order they are listed. */
static uint64_t attributes(const char *path) {
    uint64_t all = 0;
    ssize_t length = llistxattr(path, buffer, sizeof buffer);
    for (char *name = buffer; length > 0 && name < buffer + length; name += strlen(name) + 1) {
        ssize_t size = lgetxattr(path, name, value, sizeof value);
        uint64_t state = hash(0xcbf29ce484222325u, name, strlen(name) + 1);
        all ^= size < 0 ? 1 : hash(state, value, size);
    }
    return all;
}

static int say(const char *path, const struct stat *stat, int type, struct FTW *walk) {
    const char *name = path + strlen("/tmp");
    (void)type, (void)walk;
    printf("test: %s ", device);
    do printf("%02x", (unsigned char)*name); while (*name && *++name);
    printf(" %o %u:%u %lld.%09ld %lld %x:%x %llu %llu %016llx %016llx\n", stat->st_mode, stat->st_uid, stat->st_gid,
           (long long)stat->st_mtim.tv_sec, stat->st_mtim.tv_nsec, S_ISDIR(stat->st_mode) ? 0 : (long long)stat->st_size,
           (unsigned)(stat->st_rdev >> 8 & 0xfff), (unsigned)((stat->st_rdev & 0xff) | (stat->st_rdev >> 12 & 0xfff00)),
           (unsigned long long)stat->st_ino, (unsigned long long)stat->st_nlink,
           (unsigned long long)content(path, stat), (unsigned long long)attributes(path));
    return 0;
}

static void load_all(void) {
    char line[4096], path[128];
    FILE *list = fopen("/modules", "r");
    while (list && fgets(line, sizeof line, list)) {
        char *word = strtok(line, " \n"), *name = strtok(NULL, " \n");
        if (!word || !name || strcmp(word, "alias") == 0) continue;
        snprintf(path, sizeof path, "/lib/modules/%s.ko", name);
        int file = open(path, O_RDONLY | O_CLOEXEC);
        if (file >= 0) { syscall(SYS_finit_module, file, "", 0); close(file); }
    }
}

static void see(const char *name, const char *path, const char *options) {
    device = name;
    for (int tries = 0; tries < 1000 && access(path, F_OK) != 0; tries++) usleep(10000);
    if (mount(path, "/tmp", "erofs", MS_RDONLY, options) != 0) {
        printf("test: cannot mount %s: %s\n", name, strerror(errno));
        return;
    }
    nftw("/tmp", say, 32, FTW_PHYS);
    umount("/tmp");
}

int main(void) {
    setvbuf(stdout, NULL, _IOFBF, 1 << 16);
    mount("proc", "/proc", "proc", 0, NULL);
    mount("sys", "/sys", "sysfs", 0, NULL);
    mount("dev", "/dev", "devtmpfs", 0, NULL);
    load_all();
    see("disk", "/dev/vda", "");
    see("pmem", "/dev/pmem0", "dax=always");
    printf("test: end\n");
    fflush(stdout);
    tcdrain(1);
    reboot(RB_AUTOBOOT);
    return 1;
}
