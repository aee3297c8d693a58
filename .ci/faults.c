/* faults.c: a disk that fails, and a journal of what was written to it, for tests of queuectl.
 *
 *     cc -shared -fPIC -O1 -o faults.so faults.c -ldl     and run programs with LD_PRELOAD=/full/path/faults.so
 *
 * 64-bit Linux 4.11+ with glibc. The environment says what it does, and children inherit it:
 *
 * QUEUECTL_TEST_FAULTS="RULE;RULE…", a RULE being CALL:ERRNO:WHEN:PATHPART
 *     CALL      open openat read pread write pwrite lseek ftruncate fsync fdatasync flock fstat
 *               stat (also lstat, fstatat) posix_spawn (also posix_spawnp) fork (also vfork)
 *     ERRNO     its name, see ERRORS below
 *     WHEN      N the Nth matching call, N-M a range of them, N+ from the Nth on (0: none, it only
 *               counts), p0.01 at random with this probability
 *     PATHPART  what the file's path contains, or with a $ behind it ends with; nothing: any file.
 *               The path is that of /proc/self/fd, or the one given to open and stat, made absolute.
 *   A failing call is not made at all. Only processes with "python" in the name of their program or
 *   in their argv[0] fail and count; all of them if QUEUECTL_TEST_FAULTS_ALL=1.
 * QUEUECTL_TEST_COUNTER=FILE   here all processes count together (64 bits for each rule, by its place in
 *   the list: so they should have the same rules). Without it the forks of one process do.
 * QUEUECTL_TEST_FAULTS_OFF=FILE   while it exists calls neither fail nor count: "the disk is back".
 * QUEUECTL_TEST_JOURNAL=FILE   what happens to plain files whose path contains QUEUECTL_TEST_JOURNAL_PATH
 *   (-shm excluded), in any process, is appended here, as struct head, path, data: W write, T truncate
 *   (by open, too), R rename, U unlink, S fsync or fdatasync with its error, E the same with a late
 *   error. The journal is locked from before the call until it is noted, so its order is the true one
 *   over all processes. replay.py reads it.
 *
 * A failing sync is modelled on Linux since 4.13 (errseq_t). It forgets the pages it did not write: they
 * are clean from then on, and a later sync succeeds without them; who reads the file still sees them.
 * Here a sync that is made to fail does nothing but note S with its error; replay.py does the forgetting.
 * Every other descriptor of the file that was open at that moment gets EIO once, by its own next sync
 * (E: the kernel does write then, but returns before the disk is told to flush its cache; so by this
 * nothing gets durable, and nothing is forgotten). Descriptors opened later don't. A late error comes
 * even if the disk is back meanwhile, as the kernel's does.
 *
 * Not seen: mmap, writev, pwritev, fallocate, copy_file_range, sendfile, link, truncate by path, io_uring;
 * what stdio writes (glibc calls its own write); statically linked programs; files renamed to a journaled
 * name from one that is not. A pwrite with O_APPEND gets a wrong offset. A process that is killed between
 * a call and its note leaves none. Late errors: a fork has its own copy of what its descriptors have
 * seen; dup and exec lose it.
 */
#undef _FORTIFY_SOURCE
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <linux/stat.h>
#include <spawn.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

/* Calls are made by syscall(2), except for fork and posix_spawn: so nothing here calls itself. */

enum call { OPEN, OPENAT, READ, PREAD, WRITE, PWRITE, LSEEK, FTRUNCATE, FSYNC, FDATASYNC, FLOCK, STAT, FSTAT,
            SPAWN, FORK, CALLS };
static const char *const NAMES[CALLS] = {
    "open", "openat", "read", "pread", "write", "pwrite", "lseek", "ftruncate", "fsync", "fdatasync", "flock", "stat",
    "fstat", "posix_spawn", "fork"};
static const struct { const char *name; int number; } ERRORS[] = {
    {"EIO", EIO}, {"ENOSPC", ENOSPC}, {"EDQUOT", EDQUOT}, {"EMFILE", EMFILE}, {"ENFILE", ENFILE}, {"EAGAIN", EAGAIN},
    {"ENOMEM", ENOMEM}, {"ENOLCK", ENOLCK}, {"ESTALE", ESTALE}, {"EINTR", EINTR}, {"EROFS", EROFS}, {"EACCES", EACCES}};

#define RULES 32
#define FILES 256
#define FDS 4096

static struct rule { int call, error; long first, last; double chance; char path[256]; } rules[RULES];
static struct shared {
    int64_t counts[RULES];                                      /* matching calls so far, by rule */
    struct { uint64_t inode, failures; } files[FILES];          /* how many syncs of a file were made to fail */
} *shared;
static struct { uint64_t inode, failures; } opened[FDS];        /* the same when a descriptor was opened */
static int is_ready, rule_count, is_target;
static unsigned calls_with_rules;                               /* a bit for each */
static const char *off, *journal, *journal_path;

static void die(const char *why, const char *what)
{
    dprintf(2, "faults.so: %s: %s\n", why, what ? what : "");
    _exit(99);
}

/* ---- what to do, from the environment ---- */

static void parse(char *text)
{
    struct rule *rule = &rules[rule_count++];
    char *call = strsep(&text, ":"), *error = strsep(&text, ":"), *when = strsep(&text, ":"), *end;
    if (rule_count > RULES || !when || !*when || strlen(text ? text : "") >= sizeof rule->path)
        die("bad rule", call);
    for (rule->call = 0; rule->call < CALLS && strcmp(call, NAMES[rule->call]);)
        rule->call++;
    for (size_t i = 0; i < sizeof ERRORS / sizeof *ERRORS; i++)
        if (!strcmp(error, ERRORS[i].name))
            rule->error = ERRORS[i].number;
    if (rule->call == CALLS || !rule->error)
        die("unknown call or error", rule->error ? call : error);
    if (*when == 'p') {
        rule->chance = strtod(when + 1, &end);
    } else {
        rule->first = rule->last = strtol(when, &end, 10);
        if (*end == '+')
            rule->last = LONG_MAX, end++;
        else if (*end == '-')
            rule->last = strtol(end + 1, &end, 10);
    }
    if (*end)
        die("it is no N, N-M, N+ or p0.1", when);
    strcpy(rule->path, text ? text : "");
    calls_with_rules |= 1u << rule->call;
}

__attribute__((constructor)) static void setup(void)
{
    char exe[PATH_MAX] = "", argv[PATH_MAX] = "", *text = getenv("QUEUECTL_TEST_FAULTS"), *rule;
    char *all = getenv("QUEUECTL_TEST_FAULTS_ALL"), *counter = getenv("QUEUECTL_TEST_COUNTER");
    if (is_ready++)
        return;
    off = getenv("QUEUECTL_TEST_FAULTS_OFF");
    journal = getenv("QUEUECTL_TEST_JOURNAL");
    journal_path = getenv("QUEUECTL_TEST_JOURNAL_PATH");
    int fd = syscall(SYS_openat, AT_FDCWD, "/proc/self/cmdline", O_RDONLY | O_CLOEXEC);
    syscall(SYS_read, fd, argv, sizeof argv - 1);
    close(fd);
    syscall(SYS_readlinkat, AT_FDCWD, "/proc/self/exe", exe, sizeof exe - 1);
    is_target = (all && !strcmp(all, "1")) || strstr(basename(exe), "python") || strstr(basename(argv), "python");
    if (!is_target || !text || !*text)
        return;
    for (text = strdup(text); (rule = strsep(&text, ";"));)
        if (*rule)
            parse(rule);
    fd = counter ? syscall(SYS_openat, AT_FDCWD, counter, O_RDWR | O_CREAT | O_CLOEXEC, 0600) : -1;
    if (counter && (fd < 0 || syscall(SYS_ftruncate, fd, sizeof *shared)))
        die("can't be used", counter);
    shared = mmap(NULL, sizeof *shared, PROT_READ | PROT_WRITE, MAP_SHARED | (counter ? 0 : MAP_ANONYMOUS), fd, 0);
    if (shared == MAP_FAILED)
        die("can't be mapped", counter);
    close(fd);
}

/* ---- files: named by a descriptor (name is NULL), or by a folder's descriptor and a name ---- */

static char *path_of(int fd, const char *name, char *path)
{
    char link[64];
    long size = 0;
    snprintf(link, sizeof link, fd == AT_FDCWD ? "/proc/self/cwd" : "/proc/self/fd/%d", fd);
    if (!name || *name != '/')
        size = syscall(SYS_readlinkat, AT_FDCWD, link, path, PATH_MAX - 1);
    size = size < 0 ? 0 : size;
    snprintf(path + size, PATH_MAX - size, "%s%s", name && *name != '/' ? "/" : "", name ? name : "");
    return path;
}

static int matches(const char *path, const char *part)
{
    size_t size = strlen(part), length = strlen(path);
    if (!size || part[--size] != '$')
        return strstr(path, part) != NULL;
    return length >= size && !strncmp(path + length - size, part, size);
}

/* A number for the inode, 0 if it is no plain file. */
static uint64_t inode_of(int fd, const char *name)
{
    struct statx info;
    if (syscall(SYS_statx, fd, name ? name : "", AT_EMPTY_PATH, STATX_TYPE | STATX_INO, &info)
        || (info.stx_mode & S_IFMT) != S_IFREG)
        return 0;
    return info.stx_ino ^ (uint64_t)info.stx_dev_major << 56 ^ (uint64_t)info.stx_dev_minor << 44;
}

/* ---- faults ---- */

static double chance(void)
{
    static unsigned short state[3];
    static int seeded_for;
    struct timespec now;
    if (seeded_for != getpid()) {
        clock_gettime(CLOCK_REALTIME, &now);
        seeded_for = getpid();
        state[0] = seeded_for, state[1] = now.tv_nsec >> 4, state[2] = now.tv_nsec >> 20 ^ now.tv_sec;
    }
    return erand48(state);
}

/* The error that this call is to fail with, left in errno too, or 0; counts the call. */
static int fails(enum call call, int fd, const char *name)
{
    char path[PATH_MAX];
    int error = 0;
    setup();
    if (!(calls_with_rules >> call & 1) || (off && !syscall(SYS_faccessat, AT_FDCWD, off, F_OK)))
        return 0;
    path_of(fd, name, path);
    for (struct rule *rule = rules; rule < rules + rule_count; rule++) {
        if (rule->call != (int)call || (call < SPAWN && !matches(path, rule->path)))
            continue;
        long number = __atomic_add_fetch(&shared->counts[rule - rules], 1, __ATOMIC_SEQ_CST);
        if (!error && (rule->chance > 0 ? chance() < rule->chance : rule->first <= number && number <= rule->last))
            error = rule->error;
    }
    if (error)
        errno = error;
    return error;
}

/* How often a sync of this file was made to fail, by any process; NULL if that is not known. */
static uint64_t *failures_of(uint64_t inode)
{
    for (unsigned i = 0; shared && inode && i < FILES; i++) {
        uint64_t found = 0, *slot = &shared->files[(inode + i) % FILES].inode;
        if (__atomic_compare_exchange_n(slot, &found, inode, 0, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST) || found == inode)
            return &shared->files[(inode + i) % FILES].failures;
    }
    return NULL;
}

/* ---- the journal ---- */

struct head { char kind; int32_t pid, error; int64_t at; uint32_t path, data; } __attribute__((packed));

/* The journal, open and locked, if it is to have what happens to this file, whose path is set; else -1. */
static int lock_journal(int fd, const char *name, char *path)
{
    setup();
    if (!journal || !journal_path || !matches(path_of(fd, name, path), journal_path) || matches(path, "-shm$")
        || matches(path, " (deleted)$") || !inode_of(fd, name))
        return -1;
    int log = syscall(SYS_openat, AT_FDCWD, journal, O_WRONLY | O_APPEND | O_CREAT | O_CLOEXEC, 0600);
    while (log < 0 || syscall(SYS_flock, log, LOCK_EX))
        if (log < 0 || errno != EINTR)
            die("can't be opened or locked", journal);
    return log;
}

/* Note it and unlock the journal, unless nothing has happened (kind 0); errno stays as it is. */
static void note(int log, char kind, int error, int64_t at, const char *path, const void *data, size_t size)
{
    if (log < 0)
        return;
    int kept = errno;
    struct head head = {kind, getpid(), error, at, strlen(path), size};
    struct iovec parts[] = {{&head, sizeof head}, {(void *)path, head.path}, {(void *)data, size}};
    if (kind && syscall(SYS_writev, log, parts, 3) != (long)(sizeof head + head.path + size))
        die("can't be written", journal);
    syscall(SYS_flock, log, LOCK_UN);
    close(log);
    errno = kept;
}

/* ---- the calls ---- */

static int open_file(enum call call, int folder, const char *name, int flags, int mode)
{
    char path[PATH_MAX];
    if (fails(call, folder, name))
        return -1;
    int log = flags & O_TRUNC ? lock_journal(folder, name, path) : -1; /* a new file has nothing to be cut off */
    int fd = syscall(SYS_openat, folder, name, flags, mode);
    note(log, fd >= 0 ? 'T' : 0, 0, 0, fd >= 0 && log >= 0 ? path_of(fd, NULL, path) : "", NULL, 0);
    if (fd >= 0 && fd < FDS && calls_with_rules & (1u << FSYNC | 1u << FDATASYNC)) {
        uint64_t *failures = failures_of(opened[fd].inode = inode_of(fd, NULL));
        opened[fd].failures = failures ? *failures : 0;
    }
    return fd;
}

#define MODE (__extension__({ va_list more; va_start(more, flags); int mode = va_arg(more, int); va_end(more); mode; }))
int open(const char *name, int flags, ...) { return open_file(OPEN, AT_FDCWD, name, flags, MODE); }
int openat(int folder, const char *name, int flags, ...) { return open_file(OPENAT, folder, name, flags, MODE); }
int __open_2(const char *name, int flags) { return open_file(OPEN, AT_FDCWD, name, flags, 0); }
int __openat_2(int folder, const char *name, int flags) { return open_file(OPENAT, folder, name, flags, 0); }

static ssize_t write_file(enum call call, int fd, const void *data, size_t size, off_t at)
{
    char path[PATH_MAX];
    if (fails(call, fd, NULL))
        return -1;
    int log = lock_journal(fd, NULL, path);
    ssize_t done = call == WRITE ? syscall(SYS_write, fd, data, size) : syscall(SYS_pwrite64, fd, data, size, at);
    if (log >= 0 && done > 0 && call == WRITE)
        at = syscall(SYS_lseek, fd, 0, SEEK_CUR) - done;
    note(log, done > 0 ? 'W' : 0, 0, at, path, data, done > 0 ? done : 0);
    return done;
}

ssize_t write(int fd, const void *data, size_t size) { return write_file(WRITE, fd, data, size, 0); }
ssize_t pwrite(int fd, const void *data, size_t size, off_t at) { return write_file(PWRITE, fd, data, size, at); }

static int sync_file(enum call call, int fd)
{
    char path[PATH_MAX], kind = 'S';
    int log = lock_journal(fd, NULL, path), error = fails(call, fd, NULL);
    uint64_t inode = shared && fd >= 0 && fd < FDS ? inode_of(fd, NULL) : 0, *failures = failures_of(inode);
    if (error && failures)
        opened[fd].failures = __atomic_add_fetch(failures, 1, __ATOMIC_SEQ_CST), opened[fd].inode = inode;
    if (!error && syscall(call == FSYNC ? SYS_fsync : SYS_fdatasync, fd))
        error = errno;
    if (!error && failures && opened[fd].inode == inode && opened[fd].failures < *failures)
        error = EIO, kind = 'E', opened[fd].failures = *failures;
    note(log, kind, error, 0, path, NULL, 0);
    return error ? errno = error, -1 : 0;
}

int fsync(int fd) { return sync_file(FSYNC, fd); }
int fdatasync(int fd) { return sync_file(FDATASYNC, fd); }

int ftruncate(int fd, off_t size)
{
    char path[PATH_MAX];
    if (fails(FTRUNCATE, fd, NULL))
        return -1;
    int log = lock_journal(fd, NULL, path), failed = syscall(SYS_ftruncate, fd, size);
    note(log, failed ? 0 : 'T', 0, size, path, NULL, 0);
    return failed;
}

int renameat(int from_folder, const char *from, int to_folder, const char *to)
{
    char old[PATH_MAX], new[PATH_MAX];
    int log = lock_journal(from_folder, from, old);
    int failed = syscall(SYS_renameat2, from_folder, from, to_folder, to, 0);
    note(log, failed ? 0 : 'R', 0, 0, old, new, log < 0 ? 0 : strlen(path_of(to_folder, to, new)));
    return failed;
}

int unlinkat(int folder, const char *name, int flags)
{
    char path[PATH_MAX];
    int log = lock_journal(folder, name, path), failed = syscall(SYS_unlinkat, folder, name, flags);
    note(log, failed ? 0 : 'U', 0, 0, path, NULL, 0);
    return failed;
}

int rename(const char *from, const char *to) { return renameat(AT_FDCWD, from, AT_FDCWD, to); }
int unlink(const char *name) { return unlinkat(AT_FDCWD, name, 0); }

/* Calls that can only fail. */

#define FD_CALL(CALL, NUMBER, ...) return fails(CALL, fd, NULL) ? -1 : syscall(NUMBER, fd, __VA_ARGS__)
#define STAT_CALL(FOLDER, FLAGS) \
    return fails(STAT, FOLDER, name) ? -1 : syscall(SYS_newfstatat, FOLDER, name, info, FLAGS)

ssize_t read(int fd, void *data, size_t size) { FD_CALL(READ, SYS_read, data, size); }
ssize_t pread(int fd, void *data, size_t size, off_t at) { FD_CALL(PREAD, SYS_pread64, data, size, at); }
off_t lseek(int fd, off_t at, int from) { FD_CALL(LSEEK, SYS_lseek, at, from); }
int flock(int fd, int how) { FD_CALL(FLOCK, SYS_flock, how); }
int fstat(int fd, void *info) { FD_CALL(FSTAT, SYS_fstat, info); }
int stat(const char *name, void *info) { STAT_CALL(AT_FDCWD, 0); }
int lstat(const char *name, void *info) { STAT_CALL(AT_FDCWD, AT_SYMLINK_NOFOLLOW); }
int fstatat(int folder, const char *name, void *info, int flags) { STAT_CALL(folder, flags); }
int __fxstat(int v, int fd, void *info) { return (void)v, fstat(fd, info); } /* programs built for glibc before 2.33 */
int __xstat(int v, const char *name, void *info) { return (void)v, stat(name, info); }
int __lxstat(int v, const char *name, void *info) { return (void)v, lstat(name, info); }
int __fxstatat(int v, int dir, const char *name, void *info, int how) { return (void)v, fstatat(dir, name, info, how); }

pid_t fork(void) { return fails(FORK, -1, NULL) ? -1 : ((pid_t (*)(void))dlsym(RTLD_NEXT, "fork"))(); }
pid_t vfork(void) { return fork(); } /* a wrapper can't return twice */

#define SPAWN_ARGUMENTS pid_t *restrict pid, const char *restrict file, const posix_spawn_file_actions_t *actions, \
    const posix_spawnattr_t *restrict attributes, char *const argv[restrict], char *const env[restrict]
#define SPAWN_CALL(NAME) int error = fails(SPAWN, -1, NULL); \
    return error ? error : ((int (*)(SPAWN_ARGUMENTS))dlsym(RTLD_NEXT, NAME))(pid, file, actions, attributes, argv, env)
int posix_spawn(SPAWN_ARGUMENTS) { SPAWN_CALL("posix_spawn"); }
int posix_spawnp(SPAWN_ARGUMENTS) { SPAWN_CALL("posix_spawnp"); }

#define SAME(NEW, OLD) extern __typeof__(OLD) NEW __attribute__((alias(#OLD)))
SAME(open64, open); SAME(openat64, openat); SAME(__open64_2, __open_2); SAME(__openat64_2, __openat_2);
SAME(pwrite64, pwrite); SAME(pread64, pread); SAME(lseek64, lseek); SAME(ftruncate64, ftruncate);
SAME(stat64, stat); SAME(lstat64, lstat); SAME(fstat64, fstat); SAME(fstatat64, fstatat);
SAME(__xstat64, __xstat); SAME(__lxstat64, __lxstat); SAME(__fxstat64, __fxstat); SAME(__fxstatat64, __fxstatat);
