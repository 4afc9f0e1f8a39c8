/* Instructions whose result a replay must give again, one each, and a loop without any exit.
 *
 *   probe rdtsc [COUNT]     RDTSC COUNT times: the last value; fails if the counter went back
 *   probe cpuid [LEAF]      CPUID: the four registers
 *   probe rdrand            RDRAND, whether or not CPUID offers it
 *   probe rdpid             RDPID, whether or not CPUID offers it
 *   probe busy [MILLIONS]   that many million steps of a generator: its state
 *
 * RDRAND and RDPID cannot be trapped on every host: a guest that uses them unasked diverges, and these
 * are here to show that the divergence is reported.
 */
#include "sys.h"

static struct line out;

static void show(const char *name, uint64_t value)
{
    put(&out, name);
    put_number(&out, value, 16);
}

static uint64_t read_counter(void)
{
    uint32_t low, high;
    __asm__ volatile("rdtsc" : "=a"(low), "=d"(high));
    return (uint64_t)high << 32 | low;
}

static int rdtsc(uint64_t count)
{
    uint64_t last = 0;
    while (count--) {
        uint64_t now = read_counter();
        if (now < last) {
            put(&out, "rdtsc went back");
            flush(&out, 1);
            return 1;
        }
        last = now;
    }
    show("rdtsc ", last);
    flush(&out, 1);
    return 0;
}

static int cpuid(uint64_t leaf)
{
    uint32_t a = (uint32_t)leaf, b, c = 0, d;
    __asm__ volatile("cpuid" : "+a"(a), "=b"(b), "+c"(c), "=d"(d));
    show("cpuid ", a);
    show(" ", b);
    show(" ", c);
    show(" ", d);
    flush(&out, 1);
    return 0;
}

static int rdrand(void)
{
    uint64_t value;
    uint8_t valid;
    __asm__ volatile("rdrand %0; setc %1" : "=r"(value), "=qm"(valid));
    show("rdrand ", value);
    show(" valid ", valid);
    flush(&out, 1);
    return 0;
}

static int rdpid(void)
{
    uint64_t value;
    __asm__ volatile(".byte 0xf3, 0x0f, 0xc7, 0xf8" : "=a"(value)); /* rdpid %rax */
    show("rdpid ", value);
    flush(&out, 1);
    return 0;
}

static int busy(uint64_t millions)
{
    uint64_t state = 1;
    for (uint64_t left = millions * 1000000; left; left--) {
        state = state * 6364136223846793005u + 1442695040888963407u;
        __asm__ volatile("" : "+r"(state));
    }
    show("busy ", state);
    flush(&out, 1);
    return 0;
}

int main(int argc, char **argv)
{
    const char *what = argc > 1 ? argv[1] : "";
    const char *text = argc > 2 ? argv[2] : 0;
    if (equal(what, "rdtsc"))
        return rdtsc(text ? number(&text) : 1);
    if (equal(what, "cpuid"))
        return cpuid(text ? number(&text) : 0);
    if (equal(what, "rdrand"))
        return rdrand();
    if (equal(what, "rdpid"))
        return rdpid();
    if (equal(what, "busy"))
        return busy(text ? number(&text) : 100);
    put(&out, "usage: probe rdtsc [COUNT] | cpuid [LEAF] | rdrand | rdpid | busy [MILLIONS]");
    flush(&out, 2);
    return 2;
}
