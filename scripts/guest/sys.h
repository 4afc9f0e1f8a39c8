/* System calls, strings and output for the guest's own programs.
 *
 * They are linked without a C library: a page fault costs 2 ms where KVM emulates ring 0, and a
 * static glibc makes some sixty of them before main(). No heap, no errno (a negative result is the
 * error), nothing but what these programs use.
 */
#ifndef GUEST_SYS_H
#define GUEST_SYS_H

#include <asm/unistd.h>
#include <stddef.h>
#include <stdint.h>

static inline long sys6(long n, long a, long b, long c, long d, long e, long f)
{
    long ret;
    register long r10 __asm__("r10") = d;
    register long r8 __asm__("r8") = e;
    register long r9 __asm__("r9") = f;
    __asm__ volatile("syscall"
                     : "=a"(ret)
                     : "a"(n), "D"(a), "S"(b), "d"(c), "r"(r10), "r"(r8), "r"(r9)
                     : "rcx", "r11", "memory");
    return ret;
}

#define sys0(n) sys6(n, 0, 0, 0, 0, 0, 0)
#define sys1(n, a) sys6(n, (long)(a), 0, 0, 0, 0, 0)
#define sys2(n, a, b) sys6(n, (long)(a), (long)(b), 0, 0, 0, 0)
#define sys3(n, a, b, c) sys6(n, (long)(a), (long)(b), (long)(c), 0, 0, 0)
#define sys4(n, a, b, c, d) sys6(n, (long)(a), (long)(b), (long)(c), (long)(d), 0, 0)
#define sys5(n, a, b, c, d, e) sys6(n, (long)(a), (long)(b), (long)(c), (long)(d), (long)(e), 0)

/* The compiler may call these. */
void *memset(void *to, int byte, size_t count);
void *memcpy(void *to, const void *from, size_t count);

static inline size_t length(const char *text)
{
    size_t count = 0;
    while (text[count])
        count++;
    return count;
}

static inline int equal(const char *a, const char *b)
{
    while (*a && *a == *b)
        a++, b++;
    return *a == *b;
}

/* The rest of `text` if it starts with `prefix`, else 0. */
static inline const char *after(const char *text, const char *prefix)
{
    while (*prefix)
        if (*text++ != *prefix++)
            return 0;
    return text;
}

/* A line of output, written whole: each write is a system call. */
struct line {
    size_t used;
    char text[250];
};

static inline void put(struct line *line, const char *text)
{
    while (*text && line->used < sizeof line->text)
        line->text[line->used++] = *text++;
}

static inline void put_number(struct line *line, uint64_t value, unsigned base)
{
    char digits[24];
    size_t at = sizeof digits - 1;
    digits[at] = 0;
    do {
        digits[--at] = "0123456789abcdef"[value % base];
        value /= base;
    } while (value);
    put(line, digits + at);
}

static inline void flush(struct line *line, int fd)
{
    put(line, "\n");
    sys3(__NR_write, fd, line->text, line->used);
    line->used = 0;
}

/* A decimal number; `*text` is moved behind it. */
static inline uint64_t number(const char **text)
{
    uint64_t value = 0;
    while (**text >= '0' && **text <= '9')
        value = value * 10 + (uint64_t)(*(*text)++ - '0');
    return value;
}

#endif
