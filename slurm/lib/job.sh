# shellcheck shell=bash
# The life of a job: split the nodes, check them, start servers, train, and end everything with the
# true exit code. Sourced by the scripts beside it, which set RECIPE, RUN_DIR,
# STUDENT_SERVER_NODES and TEACHER_SERVER_NODES.

readonly REQUEUE_STATUS=75   # of a trainer that was asked to stop and has saved
readonly STOP_SECONDS=${STOP_SECONDS:-30} # for a trainer whose servers died, and for servers to end

declare -A PIDS=() # of srun: training, student and teacher

run_job() {
    asked_to_stop=
    trap 'asked_to_stop=yes' USR1 TERM
    split_nodes
    prepare_logs
    check_arguments "$@"
    check_nodes
    choose_port
    settings=(
        "experiment=$RECIPE" "run.dir=$RUN_DIR"
        "cluster.training_nodes=$TRAINING_NODES"
        "cluster.student_server_nodes=$STUDENT_SERVER_NODES"
        "cluster.teacher_server_nodes=$TEACHER_SERVER_NODES"
        "cluster.gpus_per_node=$GPUS_PER_NODE"
        "$@"
    )
    check_settings
    start_servers student "$STUDENT_SERVER_NODES" "$TRAINING_NODES"
    start_servers teacher "$TEACHER_SERVER_NODES" $((TRAINING_NODES + STUDENT_SERVER_NODES))
    wait_for_servers student "$STUDENT_SERVER_NODES"
    wait_for_servers teacher "$TEACHER_SERVER_NODES"
    train
}

# A signal to the job ends its sleeps too, which is no error.
pause() { sleep "$1" || true; }

say() { printf '%s %s\n' "$(date +%T)" "$*"; }

# fail STATUS CAUSE: end all steps and the job. The cause is the last line of the log.
fail() {
    end_steps
    say "$SLURM_JOB_NAME: $2" >&2
    exit "$1"
}

# --- before anything is started -------------------------------------------------------------------

# Training nodes come first, then those of the student's servers, then those of the teacher's.
split_nodes() {
    mapfile -t NODES < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
    local servers=$((STUDENT_SERVER_NODES + TEACHER_SERVER_NODES))
    TRAINING_NODES=$((${#NODES[@]} - servers))
    ((TRAINING_NODES >= 1)) || fail 2 "${#NODES[@]} nodes are fewer than $servers for servers \
(STUDENT_SERVER_NODES=$STUDENT_SERVER_NODES, TEACHER_SERVER_NODES=$TEACHER_SERVER_NODES) and one for \
training. Fix: sbatch --nodes=$((servers + 1)) or more, or fewer nodes for servers."
    GPUS_PER_NODE=${GPUS_PER_NODE:-${SLURM_GPUS_PER_NODE:-8}}
    GPUS_PER_NODE=${GPUS_PER_NODE##*:} # h100:8
    export MASTER_ADDR=${MASTER_ADDR:-${NODES[0]}}
}

# RUN_DIR/logs/JOB/ATTEMPT holds everything that this attempt writes; logs/latest leads to it.
prepare_logs() {
    local attempt=${SLURM_RESTART_COUNT:-0}
    mkdir -p "$RUN_DIR" || fail 2 "RUN_DIR=$RUN_DIR cannot be made. Fix: name a directory that you may write."
    RUN_DIR=$(realpath "$RUN_DIR")
    LOGS=$RUN_DIR/logs/$SLURM_JOB_ID/$attempt
    mkdir -p "$LOGS"
    ln -sfnT "$SLURM_JOB_ID/$attempt" "$RUN_DIR/logs/latest"
    ln -sfn "$(scontrol show job "$SLURM_JOB_ID" | sed -n 's/^ *StdOut=//p')" "$RUN_DIR/logs/$SLURM_JOB_ID/job.log"
    say "attempt $attempt of job $SLURM_JOB_ID: $TRAINING_NODES nodes train, $STUDENT_SERVER_NODES serve the" \
        "student, $TEACHER_SERVER_NODES the teacher (${NODES[*]})"
    say "logs: $LOGS"
}

# What is a variable here is not a setting there.
check_arguments() {
    local argument
    for argument; do
        case $argument in
            run.dir=*) fail 2 "$argument: logs go below the run directory too. Fix: RUN_DIR=${argument#*=} sbatch ..." ;;
            experiment=*) fail 2 "$argument: Fix: RECIPE=${argument#*=} sbatch ..." ;;
            cluster.*_nodes=* | cluster.gpus_per_node=*)
                fail 2 "$argument: the allocation decides. Fix: sbatch --nodes=... --gpus-per-node=..., STUDENT_SERVER_NODES, TEACHER_SERVER_NODES" ;;
            *=*) ;;
            *) fail 2 "$argument: arguments are settings, as train.num_steps=500" ;;
        esac
    done
}

# On every node, outside of any container: file systems, mounts, interpreter.
check_nodes() {
    local faults=$LOGS/faults mark=$LOGS/shared image mounts=$NEMO_TRD_HOME:$NEMO_TRD_HOME,$RUN_DIR:$RUN_DIR
    CONTAINER_IMAGE=${CONTAINER_IMAGE:-} SERVER_CONTAINER_IMAGE=${SERVER_CONTAINER_IMAGE:-${CONTAINER_IMAGE:-}}
    if [[ -n $CONTAINER_IMAGE$SERVER_CONTAINER_IMAGE ]]; then
        # Not piped into grep -q: srun would fail on the closed pipe.
        local options
        mounts+=${CONTAINER_MOUNTS:+,$CONTAINER_MOUNTS}
        options=$(srun --help 2>&1)
        [[ $options == *--container-image* ]] || fail 2 "CONTAINER_IMAGE is set and this Slurm has no \
Pyxis (srun knows no --container-image). Fix: unset it to run without containers, or have Pyxis installed."
    fi
    in_training=() in_servers=() needed=()
    for image in "$CONTAINER_IMAGE" "$SERVER_CONTAINER_IMAGE"; do
        if [[ -z $image ]]; then
            needed+=("$(python_of "")")
        elif [[ $image == /* ]]; then
            needed+=("$image") # a squashfs file
        fi
    done
    [[ -z $CONTAINER_IMAGE ]] || in_training=(--container-image="$CONTAINER_IMAGE" --container-mounts="$mounts"
        --no-container-mount-home --container-workdir="$RUN_DIR")
    [[ -z $SERVER_CONTAINER_IMAGE ]] || in_servers=(--container-image="$SERVER_CONTAINER_IMAGE" --container-mounts="$mounts"
        --no-container-mount-home --container-workdir="$RUN_DIR")
    export PYTHONPATH=$NEMO_TRD_HOME${PYTHONPATH:+:$PYTHONPATH}
    : > "$mark"
    srun --job-name=check --overlap --nodes="${#NODES[@]}" --ntasks-per-node=1 --cpu-bind=none \
        bash "$NEMO_TRD_HOME/slurm/lib/check_node.sh" "$mark" "$mounts" "${needed[@]}" > "$faults" 2>&1 ||
        fail 2 "$(grep -v '^srun:' "$faults" | sort | head -n 1 | grep . || tail -n 1 "$faults")"
    rm "$mark"
}

# python_of IMAGE: PYTHON, else the image's, else the checkout's, else the node's.
python_of() {
    local own=$NEMO_TRD_HOME/.venv/bin/python
    [[ -z $1 && -x $own ]] || own=python3
    printf '%s\n' "${PYTHON:-$own}"
}

# MASTER_PORT, or the first that nothing listens on. This runs on the first training node.
choose_port() {
    local first=$((29500 + SLURM_JOB_ID % 64)) last port
    last=$((first + 63))
    [[ -z ${MASTER_PORT:-} ]] || first=$MASTER_PORT last=$MASTER_PORT
    for ((port = first; port <= last; port++)); do
        if ! (: < "/dev/tcp/$MASTER_ADDR/$port") 2> /dev/null && ! (: < "/dev/tcp/127.0.0.1/$port") 2> /dev/null; then
            export MASTER_PORT=$port
            return
        fi
    done
    fail 2 "no free port on $MASTER_ADDR: something listens on $first to $last. Fix: set MASTER_PORT to a free one."
}

# The whole configuration is checked before servers load for minutes.
check_settings() {
    local status=0
    srun --job-name=plan --overlap --nodes=1 --ntasks=1 --relative=0 --cpu-bind=none "${in_training[@]}" \
        "$(python_of "$CONTAINER_IMAGE")" -m nemo_trd.plan "${settings[@]}" > "$LOGS/plan.log" 2>&1 || status=$?
    case $status in
        0) ;;
        1) say "warning: by its plan this run does not fit into the GPUs, see $LOGS/plan.log" ;;
        *) fail $status "$(grep '^nemo_trd: ' "$LOGS/plan.log" | head -n 1 | grep . || last_line "$LOGS/plan.log")" ;;
    esac
}

# --- servers --------------------------------------------------------------------------------------

# start_servers ROLE NODES FIRST_NODE
start_servers() {
    (($2 > 0)) || return 0
    export NEMO_TRD_API_KEY=${NEMO_TRD_API_KEY:-$(od -An -N32 -tx1 /dev/urandom | tr -d ' \n')}
    : > "$LOGS/$1-servers.log"
    # shellcheck disable=SC2086 # options, to be split into words
    srun --job-name="$1-server" --overlap --nodes="$2" --ntasks-per-node=1 --relative="$3" --label \
        --cpu-bind=none --kill-on-bad-exit=0 --wait=0 "${in_servers[@]}" ${SERVER_SRUN_ARGS:-} \
        "$(python_of "$SERVER_CONTAINER_IMAGE")" -m nemo_trd.serve.node "$1" \
        --reached-from "$MASTER_ADDR" --logs "$LOGS" "${settings[@]}" \
        >> "$LOGS/$1-servers.log" 2>&1 < /dev/null &
    PIDS[$1]=$!
}

# Until every node has said that its servers are healthy; their URLs become settings of the trainer.
wait_for_servers() {
    (($2 > 0)) || return 0
    local urls url
    say "waiting for the $1's servers, see $LOGS/$1-servers.log"
    until (($(grep -c '^ *[0-9]*: ready: ' "$LOGS/$1-servers.log") == $2)); do
        check_servers
        [[ -z $asked_to_stop ]] || leave "before training began"
        pause 1
    done
    urls=$(sed -n 's/^ *[0-9]*: ready: //p' "$LOGS/$1-servers.log" | tr '\n' ' ')
    for url in $urls; do
        reachable "$url" || fail 1 "$url answers on its node and cannot be reached from $MASTER_ADDR. \
Fix: open the ports between the nodes, or set MASTER_ADDR to a name in their common network."
    done
    urls=$(tr -s ' ' ',' <<< "${urls% }")
    settings+=("generation.vllm.$1.urls=[$urls]" "generation.vllm.$1.replicas=0")
    say "the $1's servers: $urls"
}

reachable() {
    local address=${1#http://}
    timeout 10 bash -c ": < '/dev/tcp/${address%:*}/${address##*:}'" 2> /dev/null
}

# Servers run until they are told to end: one that ended by itself ends the job.
check_servers() {
    local role
    for role in student teacher; do
        [[ -n ${PIDS[$role]:-} ]] || continue
        if first_failure "$LOGS/$role-servers.log" || ! kill -0 "${PIDS[$role]}" 2> /dev/null; then
            server_ended "$role"
        fi
    done
}

server_ended() {
    local log=$LOGS/$1-servers.log cause
    if [[ -n ${PIDS[training]:-} ]]; then # it may still be able to save
        scancel --signal=TERM "$(step_id training)" 2> /dev/null || true
        wait_until_ended training "$STOP_SECONDS" || true
    fi
    cause=$(sed -n 's/^ *[0-9]*: nemo_trd: //p' "$log" | head -n 1)
    fail "${STATUS:-1}" "a $1 server on ${WHERE:-its node}: ${cause:-${WHAT:-it ended}}; see $log"
}

# --- training -------------------------------------------------------------------------------------

train() {
    [[ -z $asked_to_stop ]] || leave "before training began"
    : > "$LOGS/training.err"
    # A signal before the trainer listens is lost instead of ending it, and sent again. The ranks of a
    # node share its cores, as under torchrun.
    # shellcheck disable=SC2086,SC2016 # options, to be split into words; "$@" is the inner shell's
    srun --job-name=training --overlap --nodes="$TRAINING_NODES" --ntasks-per-node="$GPUS_PER_NODE" --relative=0 \
        --cpu-bind=none --kill-on-bad-exit=0 --wait=0 --output="$LOGS/training-%4t.log" "${in_training[@]}" \
        ${TRAINING_SRUN_ARGS:-} bash -c 'trap "" USR1 TERM; export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}; exec "$@"' _ \
        "$(python_of "$CONTAINER_IMAGE")" -m nemo_trd.train "${settings[@]}" \
        2> "$LOGS/training.err" < /dev/null &
    PIDS[training]=$!
    say "training, see $LOGS/training-0000.log"
    local tell_again=0 status=0
    while kill -0 "${PIDS[training]}" 2> /dev/null; do
        ! first_failure "$LOGS/training.err" || break
        check_servers
        if [[ -n $asked_to_stop ]] && ((SECONDS >= tell_again)); then
            ((tell_again)) || say "asked to stop: the step that is under way is finished and saved"
            tell_again=$((SECONDS + 2))
            scancel --signal=USR1 "$(step_id training)" || true
        fi
        pause 1
    done
    ! first_failure "$LOGS/training.err" || trainer_failed
    wait "${PIDS[training]}" || status=$?
    unset 'PIDS[training]'
    case $status in
        0) end_steps && say "done: $RUN_DIR" ;;
        "$REQUEUE_STATUS") leave "saved; $(last_line "$RUN_DIR/log.txt")" ;;
        *) fail "$status" "training ended with status $status: $(last_line "$LOGS/training.err")" ;;
    esac
}

# The job goes on later, unless somebody has cancelled it.
leave() {
    end_steps
    if [[ $(job_state) != RUNNING ]]; then
        say "$SLURM_JOB_NAME: $1; cancelled, sbatch again to go on" >&2
    elif scontrol requeue "$SLURM_JOB_ID" 2> "$LOGS/requeue.err"; then
        say "$SLURM_JOB_NAME: $1; requeued"
    else
        say "$SLURM_JOB_NAME: $1; not requeued ($(last_line "$LOGS/requeue.err")), sbatch again to go on" >&2
    fi
    exit "$REQUEUE_STATUS"
}

trainer_failed() {
    local log status limit=$((SECONDS + 5))
    # The other ranks say what they know; and a trainer that lost its servers is not the first cause.
    wait_until_ended training 5 || true
    while [[ -n ${PIDS[student]:-}${PIDS[teacher]:-} ]] && ((SECONDS < limit)); do
        check_servers
        pause 0.2
    done
    first_failure "$LOGS/training.err"
    status=$STATUS
    # "tasks 2,5-6": the log of the first of them
    log=$(printf '%s/training-%04d.log' "$LOGS" "${TASKS%%[,-]*}")
    if [[ -z $status ]]; then # by a signal, of which srun tells the number
        kill_step training
        wait "${PIDS[training]}" || status=$?
    fi
    fail "${status:-1}" "training task $TASKS on $WHERE: $WHAT: $(cause_in "$log"); see $log"
}

# --- steps ----------------------------------------------------------------------------------------

# first_failure FILE: has srun reported a task that failed? Sets WHERE, TASKS, WHAT and STATUS,
# which is empty when a signal ended it. A trainer that has saved as it was asked to has not failed.
first_failure() {
    local pattern='^srun: error: ([^ :]+): tasks? ([^ :]+): (.*)$' line
    WHERE='' TASKS='' WHAT='' STATUS=''
    while IFS= read -r line; do
        [[ $line =~ $pattern ]] || continue
        WHERE=${BASH_REMATCH[1]} TASKS=${BASH_REMATCH[2]} WHAT=${BASH_REMATCH[3]}
        [[ $WHAT == "Exited with exit code "* ]] && STATUS=${WHAT##* } || STATUS=
        [[ $STATUS == "$REQUEUE_STATUS" ]] || return 0
        STATUS=''
    done < "$1"
    return 1
}

# The number that Slurm gave to the step of that name.
step_id() { squeue --noheader --steps --job="$SLURM_JOB_ID" --format='%i %j' | awk -v name="$1" '$2 == name {print $1}'; }

job_state() { scontrol show job "$SLURM_JOB_ID" | sed -n 's/^ *JobState=\([A-Z]*\).*/\1/p'; }

# wait_until_ended STEP SECONDS
wait_until_ended() {
    local limit=$((SECONDS + $2))
    while kill -0 "${PIDS[$1]}" 2> /dev/null; do
        ((SECONDS < limit)) || return 1
        pause 0.2
    done
}

kill_step() {
    local step
    step=$(step_id "$1")
    [[ -z $step ]] || scancel --signal=KILL "$step" 2> /dev/null || true
}

# Trainers are killed, servers are asked first: they remove what they hold in shared memory.
end_steps() {
    local name step
    [[ -z ${PIDS[training]:-} ]] || kill_step training
    for name in student teacher; do
        step=
        [[ -z ${PIDS[$name]:-} ]] || step=$(step_id "$name-server")
        [[ -z $step ]] || scancel --signal=INT "$step" 2> /dev/null || true
    done
    for name in "${!PIDS[@]}"; do
        step=$name-server
        [[ $name != training ]] || step=training
        wait_until_ended "$name" "$STOP_SECONDS" || kill_step "$step"
        wait "${PIDS[$name]}" 2> /dev/null || true
    done
    PIDS=()
}

# What a trainer's log says was first to fail, on this rank or another; else its last line.
cause_in() {
    local pattern='^nemo_trd: |rank [0-9]+ failed first: ' found
    found=$(grep -E "$pattern" "$1" 2> /dev/null | tail -n 1) || true
    [[ -n $found ]] || found=$(last_line "$1")
    printf '%s\n' "${found#rank * stops: }"
}

last_line() { { tail -n 20 "$1" 2> /dev/null | grep '[^[:space:]]' || echo "(nothing in $1)"; } | tail -n 1; }
