/* Who has nothing else to do helps: a call cuts what it is at into chunks that do not depend on each other, and threads of its group that are out of work
 * take some of them. Results do not depend on who took what.
 *
 * A group is the threads of one call of Workers.map (hardware.py), each busy until it finds no more items, or the threads that a call starts for itself.
 */
#include <pthread.h>
#include <sched.h>
#include <time.h>

#include "native.h"

enum { SLOTS = 64, PAUSES = 1 << 12 };

/* What a call is at. The ticket is the number of stages so far (from bit 40 on), this stage's chunks (from bit 20 on), and the next chunk: who gets a chunk
 * by it finds the rest as it was when the ticket was written, since the owner goes on only when all chunks are done. */
struct slot {
    uint64_t ticket;
    work *work;
    const void *what;
    const int *group;
    long left; /* chunks that are not done */
    int owner, hands, taken;
} __attribute__((aligned(128)));

static struct slot slots[SLOTS];
static int alone; /* calls of threads without a group that run now */
static __thread struct { const int *busy; int number, size, cores; } me;

/* This thread is one of a group from now on, its number 0 to size - 1; `busy` counts those of it that have work of their own. None: it leaves. */
void textlora_join(const int *busy, int number, int size)
{
    me.busy = busy, me.number = number, me.size = size;
}

/* Where this thread has no group, it shares so many cores with others like it: a call has those that are not in use. 0: with nobody. */
void textlora_cores(int cores) { me.cores = cores; }

/* Threads that a call may have, of this one's group or for so many cores; 0 where it has neither. */
int textlora_hands(void) { return me.busy ? me.size : me.cores; }

static uint64_t next_of(uint64_t ticket) { return ticket & 0xfffff; }

static uint64_t chunks_of(uint64_t ticket) { return ticket >> 20 & 0xfffff; }

/* This thread's number in a call: the owner's is 0, and who has that in the group gets the owner's. */
static int number_in(const struct slot *slot)
{
    int owner = __atomic_load_n(&slot->owner, __ATOMIC_RELAXED);
    return me.number == owner ? 0 : me.number ? me.number : owner;
}

/* Takes chunks until there are none; whether there was one. */
static int take(struct slot *slot)
{
    int took = 0;
    uint64_t ticket = __atomic_load_n(&slot->ticket, __ATOMIC_ACQUIRE);
    while (next_of(ticket) < chunks_of(ticket)) {
        int number = number_in(slot);
        if (__atomic_load_n(&slot->group, __ATOMIC_RELAXED) != me.busy || number >= __atomic_load_n(&slot->hands, __ATOMIC_RELAXED)) break;
        if (!__atomic_compare_exchange_n(&slot->ticket, &ticket, ticket + 1, 0, __ATOMIC_ACQ_REL, __ATOMIC_ACQUIRE)) continue;
        slot->work(slot->what, next_of(ticket), number);
        __atomic_sub_fetch(&slot->left, 1, __ATOMIC_RELEASE);
        took = 1;
        ticket = __atomic_load_n(&slot->ticket, __ATOMIC_ACQUIRE);
    }
    return took;
}

/* Time passes: the core's other thread first, then other threads, then nobody. */
static void wait_a_little(long turn)
{
    if (turn < PAUSES) __builtin_ia32_pause();
    else if (turn < 2 * PAUSES) sched_yield();
    else nanosleep(&(struct timespec){0, 20000}, 0);
}

/* Whether this helper's number is within its call's share of the cores. */
static int wanted(void)
{
    int calls = __atomic_load_n(&alone, __ATOMIC_RELAXED);
    return !me.cores || calls < 1 || me.number < me.cores / calls;
}

/* Chunks of others' calls, until nobody of this group has work of its own, or others need the core. */
void textlora_help(void)
{
    for (long turn = 0; __atomic_load_n(me.busy, __ATOMIC_ACQUIRE) && wanted(); turn++) {
        int took = 0;
        for (int n = 0; n < SLOTS; n++) took |= take(slots + n);
        if (took) turn = 0;
        else wait_a_little(turn);
    }
}

/* Each of some chunks, up to 2^20, by this thread, which is number 0, and by those of its group whose number is below `hands`; returns when all are done. */
void textlora_share(work *work, const void *what, long chunks, int hands)
{
    struct slot *slot = 0;
    if (chunks > 1 && hands > 1 && me.busy)
        for (int n = 0, none = 0; n < SLOTS && !slot; n++, none = 0)
            if (__atomic_compare_exchange_n(&slots[n].taken, &none, 1, 0, __ATOMIC_ACQUIRE, __ATOMIC_RELAXED)) slot = slots + n;
    if (!slot) {
        for (long chunk = 0; chunk < chunks; chunk++) work(what, chunk, 0);
        return;
    }
    slot->work = work, slot->what = what, slot->left = chunks;
    __atomic_store_n(&slot->group, me.busy, __ATOMIC_RELAXED);
    __atomic_store_n(&slot->owner, me.number, __ATOMIC_RELAXED);
    __atomic_store_n(&slot->hands, hands, __ATOMIC_RELAXED);
    __atomic_store_n(&slot->ticket, ((slot->ticket >> 40) + 1) << 40 | (uint64_t)chunks << 20, __ATOMIC_RELEASE);
    take(slot);
    for (long turn = 0; __atomic_load_n(&slot->left, __ATOMIC_ACQUIRE); turn++)
        if (turn < PAUSES) __builtin_ia32_pause();
        else sched_yield();
    __atomic_store_n(&slot->taken, 0, __ATOMIC_RELEASE);
}

struct member { const int *busy; int number, size, cores; };

static void *member(void *given)
{
    struct member *m = given;
    textlora_join(m->busy, m->number, m->size);
    textlora_cores(m->cores);
    textlora_help();
    return 0;
}

/* A call, with up to `hands` threads: those of this one's group, or of one for it alone. */
void textlora_with_hands(void (*call)(const void *, const void *), const void *first, const void *second, int hands)
{
    int busy = 1, started = 1, calls;
    struct member members[SLOTS];
    pthread_t threads[SLOTS];
    if (me.busy) {
        call(first, second);
        return;
    }
    calls = __atomic_add_fetch(&alone, 1, __ATOMIC_RELAXED);
    if (me.cores && hands > me.cores / calls) hands = me.cores / calls;
    for (int n = 1; n < hands && n < SLOTS; n++) {
        members[n] = (struct member){&busy, n, hands, me.cores};
        if (pthread_create(threads + n, 0, member, members + n)) break;
        started++;
    }
    if (started > 1) textlora_join(&busy, 0, started);
    call(first, second);
    textlora_join(0, 0, 0);
    __atomic_store_n(&busy, 0, __ATOMIC_RELEASE);
    for (int n = 1; n < started; n++) pthread_join(threads[n], 0);
    __atomic_sub_fetch(&alone, 1, __ATOMIC_RELAXED);
}
