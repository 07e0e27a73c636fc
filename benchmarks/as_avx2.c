/* Lets a process and its children believe in a processor with AVX2 and FMA, without AVX-512, AVX-VNNI and AMX: what textlora and its peers choose there can be
 * measured on a larger one. Linux on Intel, also in a virtual machine whose /proc/cpuinfo has cpuid_fault: CPUID then ends in a signal, and the answer to it
 * leaves those bits out (arch_prctl(2), ARCH_SET_CPUID).
 *
 *   cc -O2 -shared -fPIC -o as_avx2.so benchmarks/as_avx2.c
 *   LD_PRELOAD=$PWD/as_avx2.so python benchmarks/inference.py DATA demo/bench
 */
#define _GNU_SOURCE
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <sys/syscall.h>
#include <ucontext.h>
#include <unistd.h>

#define SET_CPUID 0x1012
#define BIT(n) (1u << (n))

/* No libc in a handler: errno stays as it is. */
static long let_cpuid(long yes)
{
    long result;
    __asm__ volatile("syscall" : "=a"(result) : "a"((long)SYS_arch_prctl), "D"((long)SET_CPUID), "S"(yes) : "rcx", "r11", "memory");
    return result;
}

static void answer(int sign, siginfo_t *info, void *context)
{
    greg_t *at = ((ucontext_t *)context)->uc_mcontext.gregs;
    const uint8_t *code = (const uint8_t *)at[REG_RIP];
    uint32_t leaf = at[REG_RAX], part = at[REG_RCX], a = leaf, b, c = part, d;
    if (info->si_code <= 0 || code[0] != 0x0f || code[1] != 0xa2) { /* not CPUID: a fault of the program's own */
        signal(sign, SIG_DFL);
        return;
    }
    let_cpuid(1);
    __asm__ volatile("cpuid" : "+a"(a), "=b"(b), "+c"(c), "=d"(d));
    let_cpuid(0);
    if (leaf == 7 && part == 0) {
        b &= ~(BIT(16) | BIT(17) | BIT(21) | BIT(26) | BIT(27) | BIT(28) | BIT(30) | BIT(31)); /* AVX-512 F, DQ, IFMA, PF, ER, CD, BW, VL */
        c &= ~(BIT(1) | BIT(6) | BIT(11) | BIT(12) | BIT(14));                                 /* VBMI, VBMI2, VNNI, BITALG, VPOPCNTDQ */
        d &= ~(BIT(2) | BIT(3) | BIT(8) | BIT(22) | BIT(23) | BIT(24) | BIT(25));              /* 4VNNIW, 4FMAPS, VP2INTERSECT, AMX BF16, FP16, AMX TILE, INT8 */
    } else if (leaf == 7 && part == 1) {
        a &= ~(BIT(4) | BIT(5) | BIT(21) | BIT(23)); /* AVX-VNNI, AVX-512 BF16, AMX FP16, AVX-IFMA */
        d &= ~(BIT(4) | BIT(5) | BIT(10) | BIT(19)); /* AVX-VNNI INT8, AVX-NE-CONVERT, AVX-VNNI INT16, AVX10 */
    }
    at[REG_RAX] = a, at[REG_RBX] = b, at[REG_RCX] = c, at[REG_RDX] = d, at[REG_RIP] += 2;
}

__attribute__((constructor)) static void begin(void)
{
    struct sigaction action = {.sa_sigaction = answer, .sa_flags = SA_SIGINFO | SA_NODEFER | SA_ONSTACK};
    sigaction(SIGSEGV, &action, 0);
    if (let_cpuid(0)) fprintf(stderr, "as_avx2: this system cannot hide what the processor has\n"), _exit(2);
}
