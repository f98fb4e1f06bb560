/* The first process of the guests that the tests boot. It loads the modules that every start loads, listens on vsock port 1024 and does what
 * the first line of a connection says, each connection in a process of its own:
 *
 *   echo            gives back what comes, until its end
 *   source BYTES    sends so many bytes (each 64 KiB counts one further), then ends
 *   sink            takes all until its end, answers how many bytes and their sum
 *   hold            answers "held" and then does nothing
 *   read PATH       a file's content
 *   sum PATH        how many bytes a file has, and their sum
 *   keep PATH       the same, read past the page cache into memory of its own, which it keeps until the connection's end
 *   write PATH TEXT writes into a file, answers "ok" or the error
 *   files PATH COUNT   makes so many files of 4 KiB beside each other, then removes them, answers like write
 *   pieces PATH COUNT  writes so many times 100 bytes to a file's end, answers like write
 *   list PATH       a directory's entries, one a line
 *   load MODULE     loads one and what it needs, answers like write
 *   mount TYPE SOURCE PATH  mounts, to be read alone where no more can be, makes the directory before, answers like write
 *   unmount PATH    answers like write
 *   sync -          writes everything to the disks
 *   dial PORT       connects to a port of the host, answers like write
 *   disk SERIAL     the name of the disk's device
 *   address MAC     the name of the network interface
 *   up INTERFACE ADDRESS  gives it an IPv4 address in a network of 24 bits and switches it on, answers like write
 *   return PORT     answers "ok", sends back every datagram (UDP) that comes, for ever
 *   pour ADDRESS PORT COUNT  sends so many datagrams of 1400 bytes, answers "ok"
 *   bind -          has virtio-mmio's driver look at all places that it has found nothing in
 *   unbind PATH     takes the driver from the place of a device of sysfs, answers like write
 *   panic | poweroff | reboot
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <net/if.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/mount.h>
#include <sys/reboot.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>
#include <linux/vm_sockets.h>

/* Which protocol it speaks: that of podvisor-agent, though only the tests speak with it. */
__asm__(".pushsection .note.podvisor,\"a\",@note\n"
        ".balign 4\n .long 9, 4, 1\n .asciz \"podvisor\"\n .balign 4\n .long 1\n"
        ".popsection\n");

static int load(const char *name) {
    char path[128];
    snprintf(path, sizeof path, "/lib/modules/%s.ko", name);
    int file = open(path, O_RDONLY | O_CLOEXEC);
    if (file < 0) return errno;
    int failed = syscall(SYS_finit_module, file, "", 0) ? errno : 0;
    close(file);
    return failed == EEXIST ? 0 : failed;
}

/* Loads every module of the initramfs's list that stands for the start of a guest. */
static void load_start(void) {
    char line[4096];
    FILE *list = fopen("/modules", "r");
    while (list && fgets(line, sizeof line, list)) {
        char *word = strtok(line, " \n"), *name = strtok(NULL, " \n");
        if (word && name && strcmp(word, "start") == 0) load(name);
    }
    if (list) fclose(list);
}

/* Loads one and what it needs. */
static int load_with_needs(const char *wanted) {
    char line[4096];
    FILE *list = fopen("/modules", "r");
    int failed = ENOENT;
    while (list && fgets(line, sizeof line, list)) {
        char *word = strtok(line, " \n"), *name = strtok(NULL, " \n"), *need;
        if (!word || !name || strcmp(word, "alias") == 0 || strcmp(name, wanted) != 0) continue;
        while ((need = strtok(NULL, " \n"))) load(need);
        failed = load(wanted);
    }
    if (list) fclose(list);
    return failed;
}

static void answer(int peer, int failed) {
    dprintf(peer, "%s\n", failed ? strerror(failed) : "ok");
}

static void copy(int from, int to) {
    char bytes[65536];
    ssize_t count;
    while ((count = read(from, bytes, sizeof bytes)) > 0)
        for (ssize_t done = 0; done < count;) {
            ssize_t wrote = write(to, bytes + done, count - done);
            if (wrote < 0) return;
            done += wrote;
        }
}

static void show_file(int peer, const char *path) {
    int file = open(path, O_RDONLY | O_CLOEXEC);
    if (file < 0) { answer(peer, errno); return; }
    copy(file, peer);
}

static void list(int peer, const char *path) {
    DIR *directory = opendir(path);
    struct dirent *entry;
    if (!directory) { answer(peer, errno); return; }
    while ((entry = readdir(directory)))
        if (entry->d_name[0] != '.') dprintf(peer, "%s\n", entry->d_name);
}

static int put(const char *path, const char *text) {
    int file = open(path, O_WRONLY | O_CLOEXEC);
    if (file < 0) return errno;
    return write(file, text, strlen(text)) < 0 ? errno : 0;
}

/* The entry of a class of devices whose attribute has this value. */
static void find(int peer, const char *class, const char *attribute, const char *value) {
    DIR *directory = opendir(class);
    struct dirent *entry;
    while (directory && (entry = readdir(directory))) {
        char path[512], found[128] = "";
        snprintf(path, sizeof path, "%s/%s/%s", class, entry->d_name, attribute);
        FILE *file = fopen(path, "r");
        if (!file) continue;
        if (fgets(found, sizeof found, file)) found[strcspn(found, "\n")] = 0;
        fclose(file);
        if (strcmp(found, value) == 0) { dprintf(peer, "%s\n", entry->d_name); return; }
    }
    dprintf(peer, "none\n");
}

#define PLACES "/sys/bus/platform/drivers/virtio-mmio"

static void bind_places(void) {
    DIR *directory = opendir("/sys/bus/platform/devices");
    struct dirent *entry;
    while (directory && (entry = readdir(directory))) {
        char path[512];
        snprintf(path, sizeof path, PLACES "/%s", entry->d_name);
        if (!strncmp(entry->d_name, "LNRO0005:", 9) && access(path, F_OK)) put(PLACES "/bind", entry->d_name);
    }
    if (directory) closedir(directory);
}

static int unbind_place(const char *device) {
    char path[PATH_MAX], *place, *end;
    if (!realpath(device, path)) return errno;
    if (!(place = strstr(path, "LNRO0005:"))) return ENODEV;
    if ((end = strchr(place, '/'))) *end = 0;
    return put(PLACES "/unbind", place);
}

static int connect_to_host(unsigned port) {
    struct sockaddr_vm address = { .svm_family = AF_VSOCK, .svm_cid = VMADDR_CID_HOST, .svm_port = port };
    int made = socket(AF_VSOCK, SOCK_STREAM | SOCK_CLOEXEC, 0);
    return connect(made, (struct sockaddr *)&address, sizeof address) ? errno : 0;
}

static void source(int peer, long bytes) {
    char block[65536];
    for (unsigned char round = 0; bytes > 0; round++) {
        memset(block, round, sizeof block);
        ssize_t wanted = bytes < (long)sizeof block ? bytes : (long)sizeof block;
        for (ssize_t done = 0; done < wanted;) {
            ssize_t wrote = write(peer, block + done, wanted - done);
            if (wrote < 0) return;
            done += wrote;
        }
        bytes -= wanted;
    }
}

static void sum(int from, int peer) {
    unsigned char bytes[65536];
    unsigned long total = 0, all = 0;
    ssize_t count;
    while ((count = read(from, bytes, sizeof bytes)) > 0) {
        for (ssize_t at = 0; at < count; at++) all += bytes[at];
        total += count;
    }
    dprintf(peer, "%lu %lu\n", total, all);
}

static void keep(int peer, const char *path) {
    int file = open(path, O_RDONLY | O_DIRECT | O_CLOEXEC);
    off_t size = file < 0 ? -1 : lseek(file, 0, SEEK_END);
    unsigned char *bytes = size <= 0 ? MAP_FAILED
        : mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (bytes == MAP_FAILED) { answer(peer, errno); return; }
    off_t total = 0;
    unsigned long all = 0;
    for (ssize_t count; (count = pread(file, bytes + total, size - total, total)) > 0;) total += count;
    for (off_t at = 0; at < total; at++) all += bytes[at];
    dprintf(peer, "%lu %lu\n", (unsigned long)total, all);
    while (read(peer, bytes, 1) > 0) {}
}

/* From where a file is mapped, past the page cache of where it goes: a device reads the first one's memory. */
static int write_directly(const char *from, const char *to) {
    int source = open(from, O_RDONLY | O_CLOEXEC), target = open(to, O_WRONLY | O_DIRECT | O_CLOEXEC);
    off_t size = source < 0 ? -1 : lseek(source, 0, SEEK_END);
    if (size <= 0 || target < 0) return errno;
    void *bytes = mmap(NULL, size, PROT_READ, MAP_SHARED, source, 0);
    if (bytes == MAP_FAILED) return errno;
    int failed = write(target, bytes, size) == size ? 0 : errno ? errno : EIO;
    munmap(bytes, size);
    close(source);
    close(target);
    return failed;
}

/* The device of persistent memory whose last page begins so. */
static void find_image(int peer, const char *wanted) {
    DIR *directory = opendir("/dev");
    struct dirent *entry;
    while (directory && (entry = readdir(directory))) {
        char path[PATH_MAX], label[128] = "";
        if (strncmp(entry->d_name, "pmem", 4)) continue;
        snprintf(path, sizeof path, "/dev/%s", entry->d_name);
        int device = open(path, O_RDONLY | O_CLOEXEC);
        off_t size = lseek(device, 0, SEEK_END);
        if (pread(device, label, sizeof label - 1, size - 4096) < 0) label[0] = 0;
        close(device);
        if (strcmp(label, wanted) == 0) { dprintf(peer, "%s\n", entry->d_name); return; }
    }
    dprintf(peer, "none\n");
}

static int make_files(const char *path, int count) {
    char name[PATH_MAX], bytes[4096] = "";
    for (int number = 0; number < count; number++) {
        snprintf(name, sizeof name, "%s%d", path, number);
        int file = open(name, O_WRONLY | O_CREAT | O_CLOEXEC, 0644);
        if (file < 0 || write(file, bytes, sizeof bytes) < 0 || close(file)) return errno;
    }
    for (int number = 0; number < count; number++) {
        snprintf(name, sizeof name, "%s%d", path, number);
        if (unlink(name)) return errno;
    }
    return 0;
}

static int write_pieces(const char *path, int count) {
    char bytes[100] = "";
    int file = open(path, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0644);
    if (file < 0) return errno;
    for (; count > 0; count--)
        if (write(file, bytes, sizeof bytes) < 0) return errno;
    return close(file) ? errno : 0;
}

static struct sockaddr_in place(const char *address, unsigned port) {
    struct sockaddr_in made = { .sin_family = AF_INET, .sin_port = htons(port) };
    inet_pton(AF_INET, address, &made.sin_addr);
    return made;
}

static int bring_up(const char *interface, const char *address) {
    struct ifreq request = { .ifr_flags = 0 };
    int made = socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0);
    strncpy(request.ifr_name, interface, sizeof request.ifr_name - 1);
    *(struct sockaddr_in *)&request.ifr_addr = place(address, 0);
    if (ioctl(made, SIOCSIFADDR, &request)) return errno;
    *(struct sockaddr_in *)&request.ifr_netmask = place("255.255.255.0", 0);
    if (ioctl(made, SIOCSIFNETMASK, &request)) return errno;
    request.ifr_flags = IFF_UP | IFF_RUNNING;
    return ioctl(made, SIOCSIFFLAGS, &request) ? errno : 0;
}

static void send_back(int peer, unsigned port) {
    char bytes[2048];
    struct sockaddr_in own = place("0.0.0.0", port), from;
    int made = socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0);
    answer(peer, bind(made, (struct sockaddr *)&own, sizeof own) ? errno : 0);
    for (;;) {
        socklen_t length = sizeof from;
        ssize_t count = recvfrom(made, bytes, sizeof bytes, 0, (struct sockaddr *)&from, &length);
        if (count >= 0) sendto(made, bytes, count, 0, (struct sockaddr *)&from, length);
    }
}

static int pour(const char *address, unsigned port, long count) {
    char bytes[1400] = "";
    struct sockaddr_in to = place(address, port);
    int made = socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0);
    for (; count > 0; count--)
        if (sendto(made, bytes, sizeof bytes, 0, (struct sockaddr *)&to, sizeof to) < 0) return errno;
    return 0;
}

static void serve(int peer) {
    char line[512];
    size_t length = 0;
    while (length < sizeof line - 1 && read(peer, line + length, 1) == 1 && line[length] != '\n') length++;
    line[length] = 0;
    char *verb = strtok(line, " "), *first = strtok(NULL, " "), *second = strtok(NULL, " "), *third = strtok(NULL, " ");
    if (!verb) return;
    if (!strcmp(verb, "echo")) copy(peer, peer);
    else if (!strcmp(verb, "sink")) sum(peer, peer);
    else if (!strcmp(verb, "hold")) { dprintf(peer, "held\n"); pause(); }
    else if (!strcmp(verb, "panic")) put("/proc/sysrq-trigger", "c");
    else if (!strcmp(verb, "poweroff")) reboot(RB_POWER_OFF);
    else if (!strcmp(verb, "reboot")) reboot(RB_AUTOBOOT);
    else if (!first) dprintf(peer, "what?\n");
    else if (!strcmp(verb, "source")) source(peer, atol(first));
    else if (!strcmp(verb, "read")) show_file(peer, first);
    else if (!strcmp(verb, "sum")) sum(open(first, O_RDONLY | O_CLOEXEC), peer);
    else if (!strcmp(verb, "keep")) keep(peer, first);
    else if (!strcmp(verb, "list")) list(peer, first);
    else if (!strcmp(verb, "load")) answer(peer, load_with_needs(first));
    else if (!strcmp(verb, "dial")) answer(peer, connect_to_host(atoi(first)));
    else if (!strcmp(verb, "unmount")) answer(peer, umount2(first, 0) ? errno : 0);
    else if (!strcmp(verb, "sync")) { sync(); answer(peer, 0); }
    else if (!strcmp(verb, "disk")) find(peer, "/sys/block", "serial", first);
    else if (!strcmp(verb, "address")) find(peer, "/sys/class/net", "address", first);
    else if (!strcmp(verb, "files") && second) answer(peer, make_files(first, atoi(second)));
    else if (!strcmp(verb, "pieces") && second) answer(peer, write_pieces(first, atoi(second)));
    else if (!strcmp(verb, "up") && second) answer(peer, bring_up(first, second));
    else if (!strcmp(verb, "return")) send_back(peer, atoi(first));
    else if (!strcmp(verb, "pour") && third) answer(peer, pour(first, atoi(second), atol(third)));
    else if (!strcmp(verb, "image")) find_image(peer, first);
    else if (!strcmp(verb, "dax") && second) {
        mkdir(second, 0755);
        answer(peer, mount(first, second, "erofs", MS_RDONLY, "dax") ? errno : 0);
    }
    else if (!strcmp(verb, "direct") && second) answer(peer, write_directly(first, second));
    else if (!strcmp(verb, "bind")) { bind_places(); answer(peer, 0); }
    else if (!strcmp(verb, "unbind")) answer(peer, unbind_place(first));
    else if (!strcmp(verb, "write") && second) answer(peer, put(first, second));
    else if (!strcmp(verb, "mount") && third) {
        mkdir(third, 0755);
        int failed = mount(second, third, first, 0, NULL) ? errno : 0;
        if (failed == EACCES) failed = mount(second, third, first, MS_RDONLY, NULL) ? errno : 0;
        answer(peer, failed);
    } else dprintf(peer, "what?\n");
}

int main(void) {
    struct sockaddr_vm address = { .svm_family = AF_VSOCK, .svm_cid = VMADDR_CID_ANY, .svm_port = 1024 };
    setvbuf(stdout, NULL, _IOLBF, 0);
    printf("test: begins\n");
    mount("proc", "/proc", "proc", 0, NULL);
    mount("sys", "/sys", "sysfs", 0, NULL);
    mount("dev", "/dev", "devtmpfs", 0, NULL);
    load_start();
    signal(SIGCHLD, SIG_IGN);
    signal(SIGPIPE, SIG_IGN);
    int listener = socket(AF_VSOCK, SOCK_STREAM | SOCK_CLOEXEC, 0);
    if (bind(listener, (struct sockaddr *)&address, sizeof address) || listen(listener, 128)) {
        printf("test: listen: %s\n", strerror(errno));
        reboot(RB_POWER_OFF);
    }
    printf("test: ready\n");
    for (;;) {
        int peer = accept4(listener, NULL, NULL, SOCK_CLOEXEC);
        if (peer < 0) continue;
        if (fork() == 0) {
            close(listener);
            serve(peer);
            /* Whoever hears the end of the answer can unmount what was looked at. */
            close_range(3, peer - 1, 0);
            close_range(peer + 1, ~0U, 0);
            _exit(0);
        }
        close(peer);
    }
}
