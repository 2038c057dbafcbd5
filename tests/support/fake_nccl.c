/* Stands in for libnccl on a machine without GPUs: no NCCL, no CUDA, bytes go through files.
 *
 * It checks what it is given as nccl.h has it (types, order, values), so that a wrong signature
 * in a binding fails, and moves what is broadcast from rank 0 into the memory of the others. The
 * unique id is the path of a directory below FAKE_NCCL_DIRECTORY. The groups of callers that do not
 * block are made in the background, as NCCL's. FAKE_NCCL_VERSION is the version, FAKE_NCCL_STALL=1 a
 * broadcast without end, FAKE_NCCL_CALLS a file to which every abort is written.
 */
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

enum { SUCCESS = 0, SYSTEM = 2, ARGUMENT = 4, USAGE = 5, REMOTE = 6, IN_PROGRESS = 7 };
typedef struct { char internal[128]; } Id;
typedef struct { size_t size; unsigned magic, version; int blocking; } Config;
typedef struct { char directory[128]; int size, rank, number, blocking, state; } Comm;

const char *ncclGetErrorString(int result) {
    return result == ARGUMENT ? "invalid argument" : result == REMOTE ? "remote process exited"
         : result == USAGE ? "invalid usage" : result == SYSTEM ? "unhandled system error" : "other";
}
const char *ncclGetLastError(Comm *comm) { return "none"; }

int ncclGetVersion(int *version) {
    const char *given = getenv("FAKE_NCCL_VERSION");
    *version = given ? atoi(given) : 22907;
    return SUCCESS;
}

int ncclGetUniqueId(Id *id) {
    memset(id, 0, sizeof *id);
    int length = snprintf(id->internal, sizeof *id, "%s/group_XXXXXX", getenv("FAKE_NCCL_DIRECTORY"));
    if (length >= (int)sizeof *id) return SYSTEM;
    return mkdtemp(id->internal) ? SUCCESS : SYSTEM;
}

static int there(Comm *comm, const char *name, int number) {
    char path[256];
    snprintf(path, sizeof path, "%s/%s%d", comm->directory, name, number);
    return access(path, F_OK) == 0;
}

static void put(Comm *comm, const char *name, int number, const void *bytes, size_t count) {
    char path[256], part[260];
    snprintf(path, sizeof path, "%s/%s%d", comm->directory, name, number);
    snprintf(part, sizeof part, "%s.tmp", path);
    int file = open(part, O_CREAT | O_WRONLY, 0600);
    if (file < 0 || write(file, bytes, count) != (ssize_t)count) abort();
    close(file);
    rename(part, path);
}

static int joined(Comm *comm) {
    for (int rank = 0; rank < comm->size; rank++)
        if (!there(comm, "rank", rank)) return 0;
    return 1;
}

static int join(Comm **comm, int size, Id id, int rank, int blocking) {
    if (rank < 0 || rank >= size || access(*id.internal ? id.internal : "/none", W_OK)) return ARGUMENT;
    *comm = calloc(1, sizeof **comm);
    strcpy((*comm)->directory, id.internal);
    (*comm)->size = size, (*comm)->rank = rank, (*comm)->blocking = blocking;
    put(*comm, "rank", rank, "", 0);
    while (blocking && !joined(*comm)) usleep(500);
    return blocking ? SUCCESS : IN_PROGRESS;
}

int ncclCommInitRank(Comm **comm, int size, Id id, int rank) { return join(comm, size, id, rank, 1); }

int ncclCommInitRankConfig(Comm **comm, int size, Id id, int rank, const Config *config) {
    if (config->size != sizeof *config || config->magic != 0xcafebeef) return ARGUMENT;
    if (config->version != 21400 || config->blocking != 0) return ARGUMENT;
    return join(comm, size, id, rank, config->blocking);
}

int ncclCommGetAsyncError(Comm *comm, int *state) {
    *state = there(comm, "abort", 0) ? REMOTE : comm->state ? comm->state
           : joined(comm) ? SUCCESS : IN_PROGRESS;
    return SUCCESS;
}

int ncclBroadcast(const void *from, void *to, size_t count, int type, int root, Comm *comm, void *stream) {
    char path[256];
    struct stat status;
    if (type != 1 || root != 0 || !comm || stream) return ARGUMENT; /* bytes, without streams */
    int number = comm->number++;
    if (getenv("FAKE_NCCL_STALL")) return comm->state = IN_PROGRESS;
    if (comm->rank == root) {
        put(comm, "bytes", number, from, count);
        return SUCCESS;
    }
    while (!there(comm, "bytes", number)) {
        if (there(comm, "abort", 0)) return REMOTE;
        usleep(200);
    }
    snprintf(path, sizeof path, "%s/bytes%d", comm->directory, number);
    int file = open(path, O_RDONLY);
    if (fstat(file, &status) || (size_t)status.st_size != count) return ARGUMENT;
    int whole = read(file, to, count) == (ssize_t)count;
    close(file);
    return whole ? SUCCESS : SYSTEM;
}

int ncclCommAbort(Comm *comm) {
    const char *calls = getenv("FAKE_NCCL_CALLS");
    if (calls) {
        FILE *file = fopen(calls, "a");
        fprintf(file, "abort %d\n", comm->rank);
        fclose(file);
    }
    put(comm, "abort", 0, "", 0);
    free(comm);
    return SUCCESS;
}

/* vLLM's binding looks these up and never calls them here. */
#define ABSENT(name) int name(void) { return USAGE; }
ABSENT(ncclAllReduce) ABSENT(ncclReduce) ABSENT(ncclAllGather) ABSENT(ncclReduceScatter)
ABSENT(ncclSend) ABSENT(ncclRecv) ABSENT(ncclCommDestroy) ABSENT(ncclCommSuspend)
ABSENT(ncclCommResume) ABSENT(ncclGroupStart) ABSENT(ncclGroupEnd)
ABSENT(ncclCommWindowRegister) ABSENT(ncclCommWindowDeregister)
