/* The first process of the guests that the tests boot: loads every module of /modules in order, says what it found, powers off.
 * Its note says which protocol an agent speaks; here 7, which is none of podvisor-agent's. */
#define _GNU_SOURCE
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/reboot.h>
#include <sys/syscall.h>
#include <sys/utsname.h>
#include <time.h>
#include <unistd.h>

__asm__(".pushsection .note.podvisor,\"a\",@note\n"
        ".balign 4\n .long 9, 4, 1\n .asciz \"podvisor\"\n .balign 4\n .long 7\n"
        ".popsection\n");

static long milliseconds(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return now.tv_sec * 1000 + now.tv_nsec / 1000000;
}

static void load(const char *when, const char *name) {
    char path[128];
    snprintf(path, sizeof path, "/lib/modules/%s.ko", name);
    int file = open(path, O_RDONLY | O_CLOEXEC);
    int failed = file < 0 || syscall(SYS_finit_module, file, "", 0) != 0;
    printf("test: %s %s %s\n", when, name, failed ? strerror(errno) : "loaded");
    if (file >= 0) close(file);
}

/* Every line of /modules that begins with WHEN, in order. */
static void load_all(const char *when) {
    char line[4096];
    FILE *list = fopen("/modules", "r");
    if (!list) { printf("test: no /modules\n"); return; }
    while (fgets(line, sizeof line, list)) {
        char *word = strtok(line, " \n"), *name = strtok(NULL, " \n");
        if (word && name && strcmp(word, when) == 0) load(when, name);
    }
    fclose(list);
}

static void show(const char *path) {
    char line[512];
    FILE *file = fopen(path, "r");
    if (!file) { printf("test: no %s\n", path); return; }
    while (fgets(line, sizeof line, file)) printf("test: %s: %s", path, line);
    fclose(file);
}

/* Which driver each virtio device got. */
static void show_devices(void) {
    const char *bus = "/sys/bus/virtio/devices";
    DIR *directory = opendir(bus);
    struct dirent *entry;
    while (directory && (entry = readdir(directory))) {
        char path[512], target[512];
        if (entry->d_name[0] == '.') continue;
        snprintf(path, sizeof path, "%s/%s/driver", bus, entry->d_name);
        ssize_t length = readlink(path, target, sizeof target - 1);
        target[length < 0 ? 0 : length] = 0;
        char *driver = strrchr(target, '/');
        printf("test: device %s\n", driver ? driver + 1 : "without driver");
    }
    if (directory) closedir(directory);
}

static void show_entries(const char *path) {
    DIR *directory = opendir(path);
    struct dirent *entry;
    while (directory && (entry = readdir(directory)))
        if (entry->d_name[0] != '.') printf("test: entry %s%s\n", path, entry->d_name);
    if (directory) closedir(directory);
}

int main(void) {
    struct utsname name;
    /* Without /dev/console in the initramfs there would be no output at all. */
    setvbuf(stdout, NULL, _IOLBF, 0);
    show_entries("/");
    uname(&name);
    printf("test: kernel %s\n", name.release);
    mount("proc", "/proc", "proc", 0, NULL);
    mount("sys", "/sys", "sysfs", 0, NULL);
    long begin = milliseconds();
    load_all("start");
    long middle = milliseconds();
    load_all("demand");
    printf("test: milliseconds %ld until init, %ld start, %ld demand\n", begin, middle - begin, milliseconds() - middle);
    show_devices();
    show("/proc/filesystems");
    printf("test: end\n");
    sync();
    reboot(RB_AUTOBOOT);
    return 1;
}
