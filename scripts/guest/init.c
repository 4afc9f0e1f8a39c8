/* The first process of the guest.
 *
 * Makes RDTSC fault for itself and so for every process (PR_SET_TSC), mounts, loads the virtio
 * modules, configures the network, mounts the disk, starts redis-server, says READY, keeps a shell
 * on the console, and asks redis-server once. All of it without a fork before redis-server: fork and
 * exec cost 0.4 s where KVM emulates ring 0.
 *
 *   command line   pollux.ip=10.0.0.2/24,10.0.0.1   address and default gateway of eth0
 *                  pollux.redis=off                 no redis-server
 *   signals        SIGUSR1, SIGUSR2 (busybox halt, poweroff): stop, unmount, power off
 *                  SIGTERM (busybox reboot): stop, unmount, reset
 */
#include "sys.h"

#include <fcntl.h>
#include <linux/prctl.h>
#include <linux/reboot.h>
#include <net/if.h>
#include <net/route.h>
#include <netinet/in.h>
#include <poll.h>
#include <signal.h>
#include <sys/ioctl.h>
#include <sys/mount.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <time.h>

#define POWER_OFF_PORT 0xf4
#define REDIS_PORT 6379
/* Longest wait for redis-server to be ready (an overloaded host may be slow), and for processes to
 * end, in milliseconds. */
#define READY_MS 600000
#define READY_POLL_MS 500
#define STOP_MS 10000

static struct line out;
static char command_line[2048];
static size_t command_line_size;

/* ---- reporting ---- */

static void say(const char *text)
{
    put(&out, text);
    flush(&out, 1);
}

static void complain(const char *what, const char *name, long error)
{
    put(&out, "init: ");
    put(&out, what);
    put(&out, name);
    put(&out, ": error ");
    put_number(&out, (uint64_t)-error, 10);
    flush(&out, 1);
}

/* ---- mounts, console, modules ---- */

static void mount_or_complain(const char *source, const char *target, const char *type, long flags)
{
    sys2(__NR_mkdir, target, 0755);
    long ret = sys5(__NR_mount, source, target, type, flags, "");
    if (ret < 0)
        complain("mount ", target, ret);
}

static void open_console(void)
{
    /* Opened again after a shell has ended: that hangs its terminal up for everybody.
     * Not /dev/console, which the kernel has opened: it can control no terminal session. */
    long fd = sys3(__NR_open, "/dev/ttyS0", O_RDWR | O_NOCTTY, 0);
    if (fd < 0)
        fd = sys3(__NR_open, "/dev/null", O_RDWR, 0);
    for (int to = 0; to < 3; to++)
        if (fd != to)
            sys2(__NR_dup2, fd, to);
    if (fd > 2)
        sys1(__NR_close, fd);
}

static void write_file(const char *path, const char *text)
{
    long fd = sys3(__NR_open, path, O_WRONLY | O_CLOEXEC, 0);
    long ret = fd < 0 ? fd : sys3(__NR_write, fd, text, length(text));
    if (ret < 0)
        complain("write ", path, ret);
    if (fd >= 0)
        sys1(__NR_close, fd);
}

static void load_module(const char *path)
{
    long fd = sys3(__NR_open, path, O_RDONLY | O_CLOEXEC, 0);
    long ret = fd < 0 ? fd : sys3(__NR_finit_module, fd, "", 0);
    if (ret < 0)
        complain("module ", path, ret);
    if (fd >= 0)
        sys1(__NR_close, fd);
}

/* `list`: one file name a line, in the order to load them in. */
static void load_modules(const char *list)
{
    static char order[2048];
    long fd = sys3(__NR_open, list, O_RDONLY, 0);
    if (fd < 0)
        return complain("open ", list, fd);
    long size = sys3(__NR_read, fd, order, sizeof order - 1);
    sys1(__NR_close, fd);
    for (long start = 0, at = 0; at < size; at++)
        if (order[at] == '\n') {
            char path[128];
            struct line name = {0};
            order[at] = 0;
            put(&name, "/modules/");
            put(&name, order + start);
            if (name.used < sizeof path) {
                memcpy(path, name.text, name.used);
                path[name.used] = 0;
                load_module(path);
            }
            start = at + 1;
        }
}

/* ---- command line ---- */

static void read_command_line(void)
{
    long fd = sys3(__NR_open, "/proc/cmdline", O_RDONLY, 0);
    if (fd < 0)
        return complain("open ", "/proc/cmdline", fd);
    long size = sys3(__NR_read, fd, command_line, sizeof command_line - 1);
    sys1(__NR_close, fd);
    if (size < 0)
        return complain("read ", "/proc/cmdline", size);
    command_line_size = (size_t)size;
    for (size_t at = 0; at < command_line_size; at++)
        if (command_line[at] == ' ' || command_line[at] == '\n')
            command_line[at] = 0;
}

/* The value of a parameter; 0 if it is not there. */
static const char *parameter(const char *name)
{
    for (size_t at = 0; at < command_line_size; at += length(command_line + at) + 1) {
        const char *value = after(command_line + at, name);
        if (value && *value == '=')
            return value + 1;
    }
    return 0;
}

/* ---- network ---- */

static int parse_address(const char **text, uint32_t *address)
{
    uint8_t bytes[4];
    for (int i = 0; i < 4; i++) {
        if (i && *(*text)++ != '.')
            return 0;
        if (**text < '0' || **text > '9')
            return 0;
        uint64_t value = number(text);
        if (value > 255)
            return 0;
        bytes[i] = (uint8_t)value;
    }
    memcpy(address, bytes, 4);
    return 1;
}

static void set_address(struct sockaddr *to, uint32_t address)
{
    struct sockaddr_in in = {.sin_family = AF_INET, .sin_addr.s_addr = address};
    memcpy(to, &in, sizeof in);
}

static long interface_up(long fd, const char *name, uint32_t address, uint32_t mask)
{
    struct ifreq request = {0};
    memcpy(request.ifr_name, name, length(name) + 1);
    set_address(&request.ifr_addr, address);
    long ret = sys3(__NR_ioctl, fd, SIOCSIFADDR, &request);
    if (ret < 0)
        return ret;
    set_address(&request.ifr_netmask, mask);
    ret = sys3(__NR_ioctl, fd, SIOCSIFNETMASK, &request);
    if (ret < 0)
        return ret;
    request.ifr_flags = IFF_UP | IFF_RUNNING;
    return sys3(__NR_ioctl, fd, SIOCSIFFLAGS, &request);
}

static void configure_network(void)
{
    long fd = sys3(__NR_socket, AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0);
    if (fd < 0)
        return complain("socket", "", fd);
    interface_up(fd, "lo", 0x0100007f, 0x000000ff);
    const char *text = parameter("pollux.ip");
    uint32_t address, gateway;
    if (text) {
        int good = parse_address(&text, &address) && *text++ == '/';
        uint64_t bits = good ? number(&text) : 33;
        if (!good || bits > 32) {
            say("init: pollux.ip= wants ADDRESS/BITS or ADDRESS/BITS,GATEWAY");
        } else {
            uint32_t mask = bits ? __builtin_bswap32(~0u << (32 - bits)) : 0;
            long ret = interface_up(fd, "eth0", address, mask);
            if (ret < 0)
                complain("eth0", "", ret);
            if (*text++ == ',' && parse_address(&text, &gateway)) {
                struct rtentry route = {.rt_flags = RTF_UP | RTF_GATEWAY};
                set_address(&route.rt_gateway, gateway);
                set_address(&route.rt_dst, 0);
                set_address(&route.rt_genmask, 0);
                ret = sys3(__NR_ioctl, fd, SIOCADDRT, &route);
                if (ret < 0)
                    complain("default route", "", ret);
            }
        }
    }
    sys1(__NR_close, fd);
}

/* ---- children ---- */

/* Programs choose code by CPUID, and on some hosts CPUID shows user mode the real processor: what it
 * has and the guest's kernel does not know (AVX) would not survive a change of process. These keep the
 * C library and OpenSSL to the baseline everywhere. */
#define BASELINE                                                                                  \
    "GLIBC_TUNABLES=glibc.cpu.hwcaps=-AVX,-AVX2,-AVX_Fast_Unaligned_Load,-AVX512F,-AVX512VL,"     \
    "-AVX512BW,-AVX512DQ,-AVX512CD,-FMA,-FMA4,-BMI1,-BMI2,-LZCNT,-MOVBE,-POPCNT,-RTM,-XSAVE,"     \
    "-XSAVEC,-OSXSAVE,-ERMS,-FSRM,-SSE4_1,-SSE4_2,-SSSE3",                                        \
        "OPENSSL_ia32cap=0x0:0x0"

/* Signals of init itself: blocked, fetched by rt_sigtimedwait. */
#define BIT(signal) (1ul << ((signal)-1))
static const uint64_t SIGNALS = BIT(SIGCHLD) | BIT(SIGUSR1) | BIT(SIGUSR2) | BIT(SIGTERM);

static long start(const char *path, char *const argv[], char *const environment[], int session)
{
    long pid = sys0(__NR_fork);
    if (pid)
        return pid;
    uint64_t none = 0;
    sys4(__NR_rt_sigprocmask, SIG_SETMASK, &none, 0, sizeof none);
    if (session) {
        sys0(__NR_setsid);
        sys3(__NR_ioctl, 0, TIOCSCTTY, 1);
    }
    long ret = sys3(__NR_execve, path, argv, environment);
    complain("exec ", path, ret);
    sys1(__NR_exit_group, 127);
    __builtin_unreachable();
}

static long start_shell(void)
{
    static char *argv[] = {"-sh", 0};
    static char *environment[] = {"PATH=/bin", "HOME=/data", "TERM=linux", "PS1=# ", BASELINE, 0};
    return start("/bin/sh", argv, environment, 1);
}

static long start_redis(void)
{
    static char *argv[] = {"redis-server", "/etc/redis.conf", 0};
    static char *environment[] = {"PATH=/bin", "HOME=/data", "NOTIFY_SOCKET=/run/notify", BASELINE,
                                  0};
    return start("/bin/redis-server", argv, environment, 0);
}

/* A socket on which redis-server says that it is ready, as it says to systemd. */
static long notify_socket(void)
{
    struct sockaddr_un address = {.sun_family = AF_UNIX, .sun_path = "/run/notify"};
    long fd = sys3(__NR_socket, AF_UNIX, SOCK_DGRAM | SOCK_CLOEXEC, 0);
    if (fd >= 0 && sys3(__NR_bind, fd, &address, sizeof address) < 0) {
        sys1(__NR_close, fd);
        fd = -1;
    }
    return fd;
}

/* Whether redis-server said READY=1 in time, and before it ended. */
static int wait_ready(long fd, long redis)
{
    static char text[512];
    struct pollfd wanted = {.fd = (int)fd, .events = POLLIN};
    for (int waited = 0; waited < READY_MS; waited += READY_POLL_MS) {
        long ret = sys3(__NR_poll, &wanted, 1, READY_POLL_MS);
        long size = ret > 0 ? sys3(__NR_read, fd, text, sizeof text - 1) : 0;
        for (long at = 0; at < size; at++)
            if (after(text + at, "READY=1"))
                return 1;
        if (ret < 0 || size < 0 || sys4(__NR_wait4, redis, 0, WNOHANG, 0) == redis)
            break;
    }
    return 0;
}

static struct sockaddr_in loopback(uint16_t port)
{
    return (struct sockaddr_in){.sin_family = AF_INET,
                                .sin_port = __builtin_bswap16(port),
                                .sin_addr.s_addr = __builtin_bswap32(INADDR_LOOPBACK)};
}

/* The first request of all takes redis-server and the network stack through memory and code that they
 * have not touched yet, which is slow where KVM emulates ring 0: no client shall wait for that. From a
 * port of our choice: to choose one, the kernel would first fill a table with 256 KiB of random numbers. */
static void ask_redis(void)
{
    struct sockaddr_in from = loopback(REDIS_PORT + 1), to = loopback(REDIS_PORT);
    char answer[16];
    long fd = sys3(__NR_socket, AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    struct pollfd wanted = {.fd = (int)fd, .events = POLLIN};
    int answered = fd >= 0 && sys3(__NR_bind, fd, &from, sizeof from) == 0 &&
                   sys3(__NR_connect, fd, &to, sizeof to) == 0 &&
                   sys3(__NR_write, fd, "PING\r\n", 6) == 6 &&
                   sys3(__NR_poll, &wanted, 1, READY_MS) == 1 &&
                   sys3(__NR_read, fd, answer, sizeof answer) > 0;
    if (!answered)
        say("init: redis-server does not answer");
    if (fd >= 0)
        sys1(__NR_close, fd);
}

/* ---- the end ---- */

static void wait_for_all(void)
{
    for (int waited = 0; waited < STOP_MS; waited += 20) {
        long pid;
        while ((pid = sys4(__NR_wait4, -1, 0, WNOHANG, 0)) > 0)
            ;
        if (pid < 0)
            return; /* no children */
        struct timespec pause = {.tv_nsec = 20 * 1000 * 1000};
        sys2(__NR_nanosleep, &pause, 0);
    }
}

static void end(int power_off)
{
    sys2(__NR_kill, -1, SIGTERM);
    sys2(__NR_kill, -1, SIGHUP); /* an interactive shell ignores SIGTERM */
    sys2(__NR_kill, -1, SIGCONT);
    wait_for_all();
    sys2(__NR_kill, -1, SIGKILL);
    wait_for_all();
    sys0(__NR_sync);
    sys1(__NR_chdir, "/"); /* a directory that somebody is in keeps its file system busy */
    long ret = sys2(__NR_umount2, "/data", 0);
    open_console();
    say(ret < 0 ? "init: stopped" : "init: stopped, disk unmounted");
    sys3(__NR_ioctl, 1, TCSBRK, 1); /* tcdrain: the end of what was said is still in the terminal's buffer */
    if (power_off) {
        if (sys3(__NR_ioperm, POWER_OFF_PORT, 1, 1) == 0)
            __asm__ volatile("outb %%al, %%dx" : : "a"(0), "d"(POWER_OFF_PORT));
        /* Without ACPI the kernel halts with interrupts off, which the VMM takes for off as well. */
        sys4(__NR_reboot, LINUX_REBOOT_MAGIC1, LINUX_REBOOT_MAGIC2, LINUX_REBOOT_CMD_POWER_OFF, 0);
    }
    sys4(__NR_reboot, LINUX_REBOOT_MAGIC1, LINUX_REBOOT_MAGIC2, LINUX_REBOOT_CMD_RESTART, 0);
}

/* ---- main ---- */

static void set_up(void)
{
    mount_or_complain("proc", "/proc", "proc", 0);
    mount_or_complain("dev", "/dev", "devtmpfs", 0);
    open_console();
    mount_or_complain("sys", "/sys", "sysfs", 0);
    sys2(__NR_mkdir, "/tmp", 01777);
    sys2(__NR_mkdir, "/run", 0755);
    read_command_line();
    load_modules("/modules/order");
    configure_network();
    sys2(__NR_mkdir, "/data", 0755);
    long disk = sys2(__NR_access, "/dev/vda", 0);
    if (disk == 0)
        mount_or_complain("/dev/vda", "/data", "ext4", MS_NOATIME);
    sys1(__NR_chdir, "/data");
    write_file("/proc/sys/vm/overcommit_memory", "1"); /* redis-server asks for it */
}

int main(int argc, char **argv)
{
    (void)argc, (void)argv;
    sys2(__NR_prctl, PR_SET_TSC, PR_TSC_SIGSEGV);
    sys4(__NR_rt_sigprocmask, SIG_SETMASK, &SIGNALS, 0, sizeof SIGNALS);
    set_up();

    const char *wanted = parameter("pollux.redis");
    long redis = -1;
    if (!wanted || !equal(wanted, "off")) {
        long fd = notify_socket();
        redis = start_redis();
        if (fd < 0 || !wait_ready(fd, redis))
            say("init: redis-server is not ready");
        if (fd >= 0)
            sys1(__NR_close, fd);
    }
    say("READY");
    long shell = start_shell();
    load_modules("/modules/later");
    if (redis > 0)
        ask_redis();

    for (;;) {
        long signal = sys4(__NR_rt_sigtimedwait, &SIGNALS, 0, 0, sizeof SIGNALS);
        if (signal == SIGUSR1 || signal == SIGUSR2)
            end(1);
        if (signal == SIGTERM)
            end(0);
        long pid;
        while ((pid = sys4(__NR_wait4, -1, 0, WNOHANG, 0)) > 0) {
            if (pid == shell) {
                open_console();
                shell = start_shell();
            }
            if (pid == redis) {
                say("init: redis-server ended");
                redis = -1;
            }
        }
    }
}
