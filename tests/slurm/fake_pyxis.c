/* Stands in for NVIDIA's Pyxis, which needs enroot and images: takes the options of srun that it
 * takes, and instead of entering a container only tells the task about them, in FAKE_PYXIS. */
#include <slurm/spank.h>
#include <stdio.h>

SPANK_PLUGIN(fake_pyxis, 1);

static const char *names[] = {"image", "mounts", "workdir", "no-mount-home"};
static char given[4][1024];

static int note(int option, const char *argument, int remote) {
    snprintf(given[option], sizeof given[option], "%s=%s;", names[option], argument ? argument : "");
    return ESPANK_SUCCESS;
}

struct spank_option spank_options[] = {
    {"container-image", "IMAGE", "[pyxis] stand-in", 1, 0, note},
    {"container-mounts", "MOUNTS", "[pyxis] stand-in", 1, 1, note},
    {"container-workdir", "DIR", "[pyxis] stand-in", 1, 2, note},
    {"no-container-mount-home", NULL, "[pyxis] stand-in", 0, 3, note},
    SPANK_OPTIONS_TABLE_END};

int slurm_spank_task_init(spank_t spank, int ac, char **av) {
    char all[sizeof given];
    snprintf(all, sizeof all, "%s%s%s%s", given[0], given[1], given[2], given[3]);
    return all[0] ? spank_setenv(spank, "FAKE_PYXIS", all, 1) : ESPANK_SUCCESS;
}
